"""Walk-throughs; a package so that their score functions can be named in a config."""
