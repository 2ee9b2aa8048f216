"""`beat`, `workers`."""
