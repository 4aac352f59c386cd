"""What the pages of the documentation show: their printed results and pictures, made by the code that stands there."""
