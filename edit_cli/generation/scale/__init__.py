"""One plan on many processes: `crew.py` by a launcher of processes, `ray.py` by Ray; `places.py` for both."""
