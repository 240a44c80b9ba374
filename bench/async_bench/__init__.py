"""What `async_dispatch.py` is made of: patterns of dispatch, what follows from their times, and showing it."""
