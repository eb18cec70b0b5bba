import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse
from django.urls import path


def words(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{len(request.body.split())} words")


urlpatterns = [path("words", words)]
settings.configure(DEBUG=True, ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="none")
execute_from_command_line([sys.argv[0], "runserver", "--noreload", "127.0.0.1:0"])
