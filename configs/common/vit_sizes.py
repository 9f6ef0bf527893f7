"""Sizes of FLSLViT, the same in pre-training and detection: ViT-T and ViT-B of DeiT
(arXiv 2012.12877), ViT-L (arXiv 2010.11929). ViT-S is what the root recipes say themselves.
"""

tiny = dict(embed_dim=192, depth=12, num_heads=3)
base = dict(embed_dim=768, depth=12, num_heads=12)
large = dict(embed_dim=1024, depth=24, num_heads=16)
