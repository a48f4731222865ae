"""mmemb: multimodal embedding models that think when it pays. Light to import: torch comes with its users."""

__version__ = "0.1.0"
