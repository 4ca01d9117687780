"""What makes the idea fast, lasting and shared; nothing here knows what is inferred, or why."""
