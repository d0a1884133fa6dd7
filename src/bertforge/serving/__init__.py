"""`bertforge serve`: fronts that speak HTTP, and one engine process that computes for all of them."""
