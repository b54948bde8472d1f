"""What is wrong: with this machine (`machine`), or with a model whose samples are bad (`exam`, and a file per group of checks).

Importing the package needs no torch, so that the machine can be looked at where torch is what is broken.
"""

from ddpm.doctor.findings import Finding
from ddpm.doctor.machine import check_environment

__all__ = ["Finding", "check_environment"]
