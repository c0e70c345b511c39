"""Reference trainers: one readable file a method, and the loop that runs them."""
