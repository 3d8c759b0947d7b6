"""Memory and time of a run from its config and its base's config.json alone. Pure; starts and loads nothing.

`weights`, `activations`, `engines`: bytes by what they are for. `processes`: put together for each role.
`seconds`: operations and bytes over rates. `changes`: what would have to be otherwise to fit.
"""
