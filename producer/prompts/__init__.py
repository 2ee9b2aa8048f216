"""Templates over the columns of a row, and the request bodies made with them."""
