"""stored.py: has packages of Django make a token each, and prints for each its name, the token and what it stores of it."""

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="only for these tests",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        "django.contrib.contenttypes",
        "django.contrib.auth",
        "knox",
        "rest_framework.authtoken",
        "rest_framework_api_key",
    ],
    REST_KNOX={"TOKEN_PREFIX": "knx_"},
    USE_TZ=True,
)
django.setup()

from django.contrib.auth.models import User
from django.core.management import call_command
from knox.models import get_token_model
from rest_framework.authtoken.models import Token
from rest_framework_api_key.models import APIKey

call_command("migrate", verbosity=0)
ann = User.objects.create(username="ann")

stored, token = get_token_model().objects.create(ann)
print("django-rest-knox", token, stored.digest)

stored = Token.objects.create(user=ann)
print("authtoken", stored.key, Token.objects.values_list("key", flat=True).get())

stored, token = APIKey.objects.create_key(name="ci")
print("djangorestframework-api-key", token, APIKey.objects.values_list("hashed_key", flat=True).get())
