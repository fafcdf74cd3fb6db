"""What is done to documents between reading and packing: mended, judged, compared, dropped and counted."""
