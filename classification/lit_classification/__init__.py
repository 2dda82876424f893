"""Training and evaluation of LIT on images: what lies behind `main.py`, `predict.py` and the visualisers."""
