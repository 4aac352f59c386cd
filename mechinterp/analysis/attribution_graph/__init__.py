"""Attribution graphs of one prompt: what a feature, an error, a token or a bias adds to later features and logits."""
