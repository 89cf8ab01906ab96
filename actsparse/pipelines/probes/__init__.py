"""The mechanisms measured: one file a measurement, on blocks of the profile's text. Numbers come from core."""
