"""What one does with a fitted model: write, embed and interpolate texts, follow long documents."""
