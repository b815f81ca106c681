"""`python -m tunesmith.cli`."""

from tunesmith.cli import main

raise SystemExit(main())
