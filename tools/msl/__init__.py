"""What `tools/check_msl.py` is made of: Metal's rules, checked without Apple's compiler."""
