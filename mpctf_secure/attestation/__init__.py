"""What a process can show and do about its own protection."""
