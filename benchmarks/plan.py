"""`python -m benchmarks.plan`: the former name of `python -m benchmarks.footprint`, for one release."""

from benchmarks.footprint import main

if __name__ == "__main__":
    main()
