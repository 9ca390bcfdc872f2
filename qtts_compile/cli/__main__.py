import sys

from qtts_compile.cli import main

sys.exit(main())
