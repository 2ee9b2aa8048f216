"""`results`, `show`, `errors`."""
