"""What runs and models show: `python -m analysis --help` lists the commands."""
