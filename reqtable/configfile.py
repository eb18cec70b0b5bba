"""Reading a configuration from TOML."""
