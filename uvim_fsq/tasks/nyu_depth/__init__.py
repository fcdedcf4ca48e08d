"""NYU Depth v2 and depth maps of your own."""
