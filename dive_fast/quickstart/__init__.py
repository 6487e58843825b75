"""A config for the user's own data: looks at the data, chooses settings by documented rules, writes the file."""
