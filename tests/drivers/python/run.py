"""run.py SECTION [careless]: runs what docs/drivers.md shows for a Python driver, taken from there as example.py and, for
Django, settings.py.

Prints one line for each token: the titles, or the status and why it was refused; then the type that retry_after has, and the
seconds. The error texts go to standard error, where no token may appear, unless the careless way is asked for.
"""

import asyncio
import inspect
import json
import os
import sys
import traceback

URL = os.environ["URL"]
ADDRESS = "203.0.113.7"
LOSE = "SELECT pg_terminate_backend(pg_backend_pid())"
WAIT = "SELECT retry_after, extract(epoch FROM retry_after)::float8 FROM tollgate.verify_api_token({})"


async def result(value):
    return await value if inspect.isawaitable(value) else value


async def attempt(name, refusal, call):
    try:
        print(name, json.dumps(await result(call())))
    except Exception as error:  # noqa: BLE001 (each driver has its own)
        traceback.print_exc()
        print(repr(error), error.args, file=sys.stderr)
        refused = refusal(error)
        print(name, *(refused[0], json.dumps(refused[1])) if refused else ["no refusal"])


async def check(posts, refusal, wait, lose):
    for name in ["good", "revoked", "narrow", "limited", "limited"]:
        await attempt(name, refusal, lambda name=name: posts(os.environ[name.upper()]))
    retry_after, seconds = await result(wait(os.environ["LIMITED"]))
    print("retry_after", type(retry_after).__name__, type(seconds).__name__, seconds)
    await attempt("lost", refusal, lose)


async def psycopg(example, careless):
    import psycopg as driver

    if careless:
        with driver.connect(URL, **example.OPTIONS) as connection:
            example.careless_posts(connection, os.environ["CARELESS"], ADDRESS)
    sql = WAIT.format("%s")
    with driver.connect(URL, **example.OPTIONS, autocommit=True) as connection:
        await check(
            lambda token: example.posts(connection, token, ADDRESS),
            example.refusal,
            lambda token: connection.execute(sql, [token]).fetchone(),
            lambda: connection.execute(LOSE),
        )
    with example.ConnectionPool(URL, kwargs=example.OPTIONS, min_size=1) as pool:

        def wait(token):
            with pool.connection() as connection:
                return connection.execute(sql, [token]).fetchone()

        def lose():
            with pool.connection() as connection:
                connection.execute(LOSE)

        await check(lambda token: example.posts_of_pool(pool, token, ADDRESS), example.refusal, wait, lose)
    async with example.AsyncConnectionPool(URL, kwargs=example.OPTIONS, min_size=1) as pool:

        async def wait(token):
            async with pool.connection() as connection:
                return await (await connection.execute(sql, [token])).fetchone()

        async def lose():
            async with pool.connection() as connection:
                await connection.execute(LOSE)

        await check(lambda token: example.async_posts(pool, token, ADDRESS), example.refusal, wait, lose)


async def asyncpg(example, careless):
    async with example.asyncpg.create_pool(URL, **example.OPTIONS, min_size=1) as pool:
        if careless:
            async with pool.acquire() as connection:
                await example.careless_posts(connection, os.environ["CARELESS"], ADDRESS)
        for error in [
            example.asyncpg.InvalidAuthorizationSpecificationError,
            example.asyncpg.InsufficientPrivilegeError,
            example.asyncpg.ConfigurationLimitExceededError,
        ]:
            assert error.sqlstate in example.STATUS
        await check(
            lambda token: example.posts(pool, token, ADDRESS),
            example.refusal,
            lambda token: pool.fetchrow(WAIT.format("$1"), token),
            lambda: pool.execute(LOSE),
        )


async def sqlalchemy(example, careless):
    from sqlalchemy import text
    from sqlalchemy.orm import Session

    url = URL.replace("postgresql://", "postgresql+psycopg://")
    if careless:
        example.careless_posts(url, os.environ["CARELESS"], ADDRESS)
    engine = example.engine(url)

    def wait(token):
        with engine.begin() as connection:
            return connection.execute(text(WAIT.format(":token")), {"token": token}).one()

    def lose():
        with engine.begin() as connection:
            connection.execute(text(LOSE))

    await check(lambda token: example.posts(engine, token, ADDRESS), example.refusal, wait, lose)
    with Session(engine) as session, session.begin():
        user = session.scalar(example.AUTHENTICATE, {"token": os.environ["GOOD"], "client_ip": ADDRESS})
        assert user == "ben", user
    engine.dispose()


def in_django(careless):
    from urllib.parse import urlsplit

    import django
    import settings as shown
    from django.conf import settings

    url = urlsplit(URL)
    database = shown.DATABASES["default"]
    database |= {"NAME": url.path[1:], "USER": url.username, "HOST": url.hostname, "PORT": url.port}
    if careless:
        del database["OPTIONS"]["server_side_binding"]
    settings.configure(DATABASES=shown.DATABASES)
    django.setup()
    import example
    from django.db import connection

    def wait(token):
        with connection.cursor() as cursor:
            cursor.execute(WAIT.format("%s"), [token])
            return cursor.fetchone()

    def lose():
        with connection.cursor() as cursor:
            cursor.execute(LOSE)

    if careless:
        example.posts(os.environ["CARELESS"], ADDRESS)
    # Django refuses to run in an event loop, and nothing here waits for one.
    drive(check(lambda token: example.posts(token, ADDRESS), example.refusal, wait, lose))


def drive(coroutine):
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits")


section, careless = sys.argv[1], sys.argv[2:] == ["careless"]
if section == "django":
    in_django(careless)
else:
    import example

    asyncio.run(globals()[section](example, careless))
