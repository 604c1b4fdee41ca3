"""The role of giving a guest away: rounds, hints, page sender, hand-over."""
