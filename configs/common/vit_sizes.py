"""Sizes of FLSLViT, the same in pre-training and detection (those of DeiT, arXiv 2012.12877, and
of ViT-L, arXiv 2010.11929)."""

tiny = dict(embed_dim=192, depth=12, num_heads=3)
small = dict(embed_dim=384, depth=12, num_heads=6)
base = dict(embed_dim=768, depth=12, num_heads=12)
large = dict(embed_dim=1024, depth=24, num_heads=16)
