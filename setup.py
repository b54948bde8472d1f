import sys

sys.exit("setup.py: the package is described in pyproject.toml; install it with: pip install -e .")
