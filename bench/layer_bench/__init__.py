"""What `moe_layer.py` is made of: measuring a layer and its peers, and showing what came of it."""
