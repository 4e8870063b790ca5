"""A run's folder as one HTML page: `collect` reads it, `page` writes it."""
