"""Surgery: trained models made smaller, sparser, elastic, or other."""
