"""Draw where the backbone samples pictures: `python tools/visualize_offset.py street.jpg --config C --checkpoint F`."""

import sys

try:
    from lit_backbone.mm.commands import one_line_errors
    from lit_backbone.mm.inference import visualize_offset
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")

if __name__ == "__main__":
    with one_line_errors():
        visualize_offset(__doc__)
