"""Draw DTM's sampling positions: `python tools/visualize_offset.py street.jpg --config CONFIG --checkpoint FILE`."""

from lit_backbone.mm.inference import visualize_offset

if __name__ == "__main__":
    visualize_offset(__doc__)
