"""Apple's metal-cpp: where to get it, and what its headers declare."""
