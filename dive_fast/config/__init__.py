"""A run's settings: schema, reading, errors in one line, reference."""
