"""Rules between keys: of one stage, of online stages, between sections."""
