"""Examines a machine (`jax-simpo doctor`): what is here, what to mend, and what attention and loss head do on its chip.

`facts` gathers versions, devices and settings; `findings` says what to do about them; `measure` tries the programs on
the chip; `report` holds and shows the result.
"""

from __future__ import annotations

from jax_simpo.doctor.report import Examination, examine_machine, show

__all__ = ["Examination", "examine_machine", "show"]
