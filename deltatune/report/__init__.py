"""What a run says at its end: one screen, and a page that stays."""
