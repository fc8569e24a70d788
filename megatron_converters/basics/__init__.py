"""What every part uses: errors, element types, quantities in words, JSON."""
