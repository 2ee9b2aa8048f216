"""Results out of SQL, into files."""
