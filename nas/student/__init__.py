"""The deliverable: exporting, verifying, measuring and packing a student."""
