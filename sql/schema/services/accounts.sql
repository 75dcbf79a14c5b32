-- Service accounts: programs that act for themselves. One gets access tokens by proving who it is (RFC 6749 section 4.4): by a
-- secret, by an assertion that one of its keys has signed (RFC 7523), or by a token of a trusted issuer (workloads.sql).
--
-- The account is the user service:<id>, which nothing else may be. So its secrets are API tokens of that user, which grant nothing
-- but prove who calls; its access tokens are that user's; and usage, limits and revocation work as for any user. A change that
-- takes something away from an account gives the user a new mark (revoked_users): what came of the account before is refused at
-- once, and a token that is being issued meanwhile is issued again (extension/src/services).
--
-- The library reads services, service_keys and service_workloads by column numbers (extension/src/store/services.rs).

CREATE TYPE tollgate.client_credentials_token AS (
    code         text,
    access_token text,
    jti          uuid,
    expires_at   timestamptz,
    scopes       text[],
    audience     text[]
);
COMMENT ON TYPE tollgate.client_credentials_token IS
    'The outcome of client_credentials: with code VALID an access token, else why there is none';

CREATE TABLE tollgate.services (
    id              text        COLLATE "C" NOT NULL CONSTRAINT services_pkey PRIMARY KEY CHECK (id ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    scopes          text[]      NOT NULL,
    audience        text[],
    lifetime        integer     CHECK (lifetime > 0),
    disabled_at     timestamptz,
    jwks_url        text,
    name            text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    description     text        CHECK (length(description) <= 1000),
    owner           text        CHECK (length(owner) BETWEEN 1 AND 255),
    disabled_reason text,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by      text        NOT NULL DEFAULT tollgate.acting_role(),
    fetched_at      timestamptz,
    tried_at        timestamptz,
    due_at          timestamptz,
    failures        integer     NOT NULL DEFAULT 0,
    problem         text,
    problem_at      timestamptz
) USING heap;
COMMENT ON TABLE tollgate.services IS 'Service accounts, with what their access tokens may have at most';
COMMENT ON COLUMN tollgate.services.audience IS 'NULL for that of tollgate.audience';
COMMENT ON COLUMN tollgate.services.lifetime IS 'Of its access tokens, in seconds; NULL for tollgate.access_token_lifetime';
COMMENT ON COLUMN tollgate.services.jwks_url IS 'Where the daemon fetches its keys, if they are not given';
COMMENT ON COLUMN tollgate.services.tried_at IS 'When fetching its keys last ended, well or not';
COMMENT ON COLUMN tollgate.services.failures IS 'How often fetching has failed since it last succeeded';
CREATE INDEX services_fetched ON tollgate.services (due_at, id) WHERE jwks_url IS NOT NULL;
SELECT pg_extension_config_dump('tollgate.services', '');

CREATE TABLE tollgate.service_keys (
    account_id text        COLLATE "C" NOT NULL REFERENCES tollgate.services ON DELETE CASCADE,
    kid        text        COLLATE "C" NOT NULL CHECK (octet_length(kid) BETWEEN 1 AND 256),
    algorithm  text        COLLATE "C" NOT NULL CHECK (algorithm IN ('ES256', 'EdDSA', 'RS256')),
    jwk        text        NOT NULL CHECK (octet_length(jwk) <= 4096),
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT service_keys_pkey PRIMARY KEY (account_id, kid)
) USING heap;
COMMENT ON TABLE tollgate.service_keys IS 'Public keys of service accounts, with which they sign assertions';
SELECT pg_extension_config_dump('tollgate.service_keys', '');

CREATE TABLE tollgate.used_assertions (
    client_id  text        COLLATE "C" NOT NULL CHECK (length(client_id) BETWEEN 1 AND 63),
    jti        text        COLLATE "C" NOT NULL CHECK (length(jti) BETWEEN 1 AND 255),
    expires_at timestamptz NOT NULL,
    CONSTRAINT used_assertions_pkey PRIMARY KEY (client_id, jti)
) USING heap;
COMMENT ON TABLE tollgate.used_assertions IS 'Assertions that were used, each of which is good once';
COMMENT ON COLUMN tollgate.used_assertions.expires_at IS 'When the assertion ends by itself; purged an hour later';
CREATE INDEX used_assertions_expires ON tollgate.used_assertions (expires_at, jti);
SELECT pg_extension_config_dump('tollgate.used_assertions', '');

-- Beside the account, whose row no failed attempt may lock.
CREATE TABLE tollgate.service_refusals (
    account_id text        COLLATE "C" NOT NULL CONSTRAINT service_refusals_pkey PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT '-infinity'
) USING heap WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.service_refusals IS 'When an event last said that a service account was refused';
SELECT pg_extension_config_dump('tollgate.service_refusals', '');

CREATE FUNCTION tollgate.client_credentials(
    client_id text,
    secret    text   DEFAULT NULL,
    assertion text   DEFAULT NULL,
    scopes    text[] DEFAULT NULL,
    audience  text[] DEFAULT NULL,
    client_ip inet   DEFAULT NULL
) RETURNS tollgate.client_credentials_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'client_credentials';
COMMENT ON FUNCTION tollgate.client_credentials(text, text, text, text[], text[], inet) IS
    'Issues an access token for a service account that proves who it is: by a secret, or by an assertion, which is one that it has signed (good once) or a token of a trusted issuer that meets a trust_workload. For all of the account''s scopes and audiences, or those asked for. Never raises for bad credentials: its code is VALID, INVALID_CLIENT, INSUFFICIENT_SCOPE, WRONG_AUDIENCE or RATE_LIMITED, and what it found must be committed. Why a client was refused is in the log and in the event service.refused, at most one a minute for each account; 55000 without tollgate.issuer, a signing key or its master key';

CREATE FUNCTION tollgate.check_consumes(function text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_consumes';
COMMENT ON FUNCTION tollgate.check_consumes(text) IS
    'Raises 25001 in a transaction block of a role that has the capability gateway and no other: what the named function consumes might be rolled back there after it was answered. Guards against mistakes; the role could still abort its own statement. Internal.';

CREATE FUNCTION tollgate.check_service_fields(
    id text, name text, scopes text[], audience text[], lifetime interval, description text, owner text
) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_service_fields';
COMMENT ON FUNCTION tollgate.check_service_fields(text, text, text[], text[], interval, text, text) IS
    'Raises 22023 unless a service account may have these fields; returns the scopes without duplicates. Internal.';

CREATE FUNCTION tollgate.without_services(user_ids text[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT ARRAY(SELECT u.id FROM unnest($1) WITH ORDINALITY u (id, n) WHERE NOT starts_with(u.id, 'service:') ORDER BY u.n);
END;
COMMENT ON FUNCTION tollgate.without_services(text[]) IS 'These user ids without those of service accounts, which no users table decides about. Internal.';

-- ---- Managing accounts. The row of the account is locked first, and then its tokens.

CREATE FUNCTION tollgate.service_detail(id text) RETURNS jsonb
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_build_object('name', s.name, 'description', s.description, 'owner', s.owner, 'scopes', s.scopes, 'audience', s.audience,
                              'lifetime', s.lifetime)
        FROM tollgate.services s WHERE s.id = $1;
END;
COMMENT ON FUNCTION tollgate.service_detail(text) IS 'What a service account may have, for events. Internal.';

CREATE FUNCTION tollgate.note_service(event text, id text, detail jsonb) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO tollgate.audit_log (event, user_id, detail) VALUES ($1, 'service:' || $2, jsonb_strip_nulls(jsonb_build_object('service', $2) || $3));
END;
COMMENT ON FUNCTION tollgate.note_service(text, text, jsonb) IS 'Records an event of a service account. Internal.';

CREATE FUNCTION tollgate.lock_service(id text, shared boolean DEFAULT false) RETURNS tollgate.services
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    account tollgate.services;
BEGIN
    PERFORM tollgate.without_token('id', $1);
    IF $2 THEN
        SELECT s.* INTO account FROM tollgate.services s WHERE s.id = $1 FOR SHARE;
    ELSE
        SELECT s.* INTO account FROM tollgate.services s WHERE s.id = $1 FOR NO KEY UPDATE;
    END IF;
    IF account.id IS NULL THEN
        RAISE EXCEPTION 'there is no such service account'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: id, of %s.', tollgate.quote_redacted($1)),
                  HINT = 'tollgate.service_accounts shows them; tollgate.create_service_account(id, name, scopes) creates one.';
    END IF;
    RETURN account;
END
$$;
COMMENT ON FUNCTION tollgate.lock_service(text, boolean) IS 'Locks a service account until the transaction ends, and returns its row; raises 42704 if there is none. Internal.';

CREATE FUNCTION tollgate.lock_enabled_service(id text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    account tollgate.services := tollgate.lock_service($1, true);
BEGIN
    IF account.disabled_at IS NOT NULL THEN
        RAISE EXCEPTION 'the service account is disabled'
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Argument: id, of %s.', tollgate.quote_redacted($1)),
                  HINT = 'Enable it first, with tollgate.enable_service_account(id).';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.lock_enabled_service(text) IS
    'Keeps a service account as it is until the transaction ends; raises 42704 if there is none, 55000 if it is disabled. Internal.';

CREATE FUNCTION tollgate.create_service_account(
    id          text,
    name        text,
    scopes      text[]   DEFAULT '{}',
    audience    text[]   DEFAULT NULL,
    lifetime    interval DEFAULT NULL,
    description text     DEFAULT NULL,
    owner       text     DEFAULT NULL
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    $3 := tollgate.check_service_fields($1, $2, $3, $4, $5, $6, $7);
    INSERT INTO tollgate.services (id, name, scopes, audience, lifetime, description, owner)
        VALUES ($1, $2, $3, $4, floor(extract(epoch FROM $5))::integer, $6, $7)
        ON CONFLICT ON CONSTRAINT services_pkey DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is a service account of this id already'
            USING ERRCODE = 'duplicate_object', DETAIL = format('Argument: id, of %s.', tollgate.quote_redacted($1)),
                  HINT = 'Choose another id, or change the account with tollgate.update_service_account().';
    END IF;
    INSERT INTO tollgate.service_refusals (account_id) VALUES ($1) ON CONFLICT ON CONSTRAINT service_refusals_pkey DO NOTHING;
    PERFORM tollgate.note_service('service.created', $1, tollgate.service_detail($1));
END
$$;
COMMENT ON FUNCTION tollgate.create_service_account(text, text, text[], text[], interval, text, text) IS
    'Creates a service account: the user service:<id>, whose access tokens have at most these scopes and audiences (NULL: that of tollgate.audience) and this lifetime; event service.created; 42710 if there is one of this id';

CREATE FUNCTION tollgate.update_service_account(
    id          text,
    name        text     DEFAULT NULL,
    scopes      text[]   DEFAULT NULL,
    audience    text[]   DEFAULT NULL,
    lifetime    interval DEFAULT NULL,
    description text     DEFAULT NULL,
    owner       text     DEFAULT NULL
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    checked  text[];
    account  tollgate.services;
    before   jsonb;
    changes  jsonb;
    narrowed boolean;
BEGIN
    -- Before the look-up, so that a token in an argument is refused as one. What is NULL was checked before.
    checked := tollgate.check_service_fields($1, coalesce($2, 'unchanged'), coalesce($3, '{}'), $4, $5, $6, $7);
    account := tollgate.lock_service($1);
    $3 := CASE WHEN $3 IS NULL THEN account.scopes ELSE checked END;
    before := tollgate.service_detail($1);
    narrowed := EXISTS (SELECT FROM unnest(account.scopes) s WHERE NOT tollgate.scope_grants($3, s))
        OR $4 IS NOT NULL AND (account.audience IS NULL OR NOT account.audience <@ $4);
    UPDATE tollgate.services s
        SET name = coalesce($2, s.name), scopes = $3, audience = coalesce($4, s.audience),
            lifetime = coalesce(floor(extract(epoch FROM $5))::integer, s.lifetime), description = coalesce($6, s.description),
            owner = coalesce($7, s.owner)
        WHERE s.id = $1;
    SELECT jsonb_object_agg(a.key, jsonb_build_object('from', b.value, 'to', a.value)) INTO changes
        FROM jsonb_each(tollgate.service_detail($1)) a JOIN jsonb_each(before) b ON b.key = a.key AND b.value <> a.value;
    IF changes IS NULL THEN
        RETURN;
    END IF;
    IF narrowed THEN
        PERFORM tollgate.end_access_of_users(ARRAY['service:' || $1], 'the service account was narrowed', '{}');
    END IF;
    INSERT INTO tollgate.audit_log (event, user_id, detail)
        VALUES ('service.updated', 'service:' || $1, jsonb_build_object('service', $1, 'changes', changes));
    IF narrowed THEN
        PERFORM tollgate.notify_token_event('service.updated', NULL, 'service:' || $1, NULL, NULL);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.update_service_account(text, text, text[], text[], interval, text, text) IS
    'Changes a service account; what is NULL stays. With fewer scopes or audiences the access tokens that it has end at once; event service.updated; 42704 if there is none';

CREATE FUNCTION tollgate.disable_service_account(id text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('id', $1);
    $2 := tollgate.stored_reason($2);
    UPDATE tollgate.services s SET disabled_at = clock_timestamp(), disabled_reason = $2 WHERE s.id = $1 AND s.disabled_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM tollgate.lock_tokens_of_users(ARRAY['service:' || $1]);
    PERFORM tollgate.disable_tokens_of_users(ARRAY['service:' || $1], jsonb_build_object('service', $1));
    PERFORM tollgate.end_access_of_users(ARRAY['service:' || $1], $2, '{}');
    PERFORM tollgate.note_service('service.disabled', $1, jsonb_build_object('reason', $2));
    PERFORM tollgate.notify_token_event('service.disabled', NULL, 'service:' || $1, $2, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.disable_service_account(text, text) IS
    'Refuses a service account, its secrets and all access tokens that it has, at once; false if there is none that is enabled. Events service.disabled, and token.disabled for each secret';

CREATE FUNCTION tollgate.enable_service_account(id text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('id', $1);
    $2 := tollgate.stored_reason($2);
    UPDATE tollgate.services s SET disabled_at = NULL, disabled_reason = NULL WHERE s.id = $1 AND s.disabled_at IS NOT NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM tollgate.lock_tokens_of_users(ARRAY['service:' || $1]);
    PERFORM tollgate.enable_tokens_of_users(ARRAY['service:' || $1], jsonb_build_object('service', $1));
    PERFORM tollgate.note_service('service.enabled', $1, jsonb_build_object('reason', $2));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.enable_service_account(text, text) IS
    'Accepts a disabled service account and its secrets again; access tokens from before stay refused. False if there is none that is disabled. Events service.enabled, and token.enabled for each secret';

CREATE FUNCTION tollgate.delete_service_account(id text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.without_token('id', $1);
    $2 := tollgate.stored_reason($2);
    DELETE FROM tollgate.services s WHERE s.id = $1;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    affected := tollgate.revoke_without_notification(ARRAY['service:' || $1], $2, jsonb_build_object('service', $1));
    PERFORM tollgate.end_access_of_users(ARRAY['service:' || $1], $2, '{}');
    -- One that is locked stays, for an account of the same id.
    DELETE FROM tollgate.service_refusals r
        WHERE r.account_id = (SELECT o.account_id FROM tollgate.service_refusals o WHERE o.account_id = $1 FOR UPDATE SKIP LOCKED);
    PERFORM tollgate.note_service('service.deleted', $1, jsonb_build_object('reason', $2, 'secrets', affected));
    PERFORM tollgate.notify_token_event('service.deleted', NULL, 'service:' || $1, $2, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.delete_service_account(text, text) IS
    'Deletes a service account, with its keys and the workloads that it trusts, revokes its secrets, and refuses all access tokens that it has, at once; false if there is none. Events service.deleted, and token.revoked for each secret';

-- ---- What it proves itself by

CREATE FUNCTION tollgate.create_service_account_secret(
    id          text,
    name        text        DEFAULT NULL,
    expires_in  interval    DEFAULT NULL,
    expires_at  timestamptz DEFAULT NULL,
    allowed_ips cidr[]      DEFAULT NULL
) RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_service_account_secret';
COMMENT ON FUNCTION tollgate.create_service_account_secret(text, text, interval, timestamptz, cidr[]) IS
    'Issues a secret of a service account: an API token of service:<id> without scopes, which is listed, rotated and revoked like any other; several may be good at once. Access tokens that it got end with it. The returned row is the only place where its plaintext appears; event token.created; 42704 if there is no such account, 55000 if it is disabled';

CREATE FUNCTION tollgate.replace_service_keys(account_id text, jwks text, OUT stored integer, OUT refused integer, OUT detail text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    usable constant text[] := '{ES256,EdDSA,RS256}';
    came  text[];
    went  text[];
BEGIN
    -- NULL takes all away.
    IF $2 IS NULL THEN
        stored := 0;
        refused := 0;
    ELSE
        SELECT count(k.jwk), count(*) - count(k.jwk), left(string_agg(k.problem, '; '), 1000)
            INTO stored, refused, detail FROM tollgate.read_jwks($2, usable) k;
        IF stored = 0 THEN
            detail := coalesce(detail, 'the key set is empty');
            RETURN;
        END IF;
    END IF;
    WITH removed AS (
        DELETE FROM tollgate.service_keys o
            WHERE o.account_id = $1
              AND NOT EXISTS (SELECT FROM tollgate.read_jwks($2, usable) k WHERE k.kid = o.kid AND k.jwk = o.jwk)
            RETURNING o.kid
    )
    SELECT array_agg(r.kid ORDER BY r.kid) INTO went FROM removed r;
    WITH added AS (
        INSERT INTO tollgate.service_keys AS o (account_id, kid, algorithm, jwk)
            SELECT $1, k.kid, k.algorithm, k.jwk FROM tollgate.read_jwks($2, usable) k WHERE k.jwk IS NOT NULL
            ON CONFLICT ON CONSTRAINT service_keys_pkey DO NOTHING
            RETURNING o.kid
    )
    SELECT array_agg(a.kid ORDER BY a.kid) INTO came FROM added a;
    IF came IS NULL AND went IS NULL THEN
        RETURN;
    END IF;
    IF went IS NOT NULL THEN
        PERFORM tollgate.end_access_of_users(ARRAY['service:' || $1], 'a key of the service account was taken away', '{}');
    END IF;
    PERFORM tollgate.note_service('service.keys_changed', $1, jsonb_build_object('keys', stored,
        'came', to_jsonb(coalesce(came[1:50], '{}')), 'went', to_jsonb(coalesce(went[1:50], '{}'))));
    IF went IS NOT NULL THEN
        PERFORM tollgate.notify_token_event('service.keys_changed', NULL, 'service:' || $1, NULL, NULL);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.replace_service_keys(text, text) IS
    'Makes the keys of a service account those of a JWK set (NULL: none), unless that has none that can be used; where a key goes, the access tokens of the account end. Returns how many were stored and left out, and why. Internal.';

CREATE FUNCTION tollgate.set_service_account_keys(id text, jwks jsonb DEFAULT NULL, jwks_url text DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address text;
    account tollgate.services;
    result  record;
BEGIN
    PERFORM tollgate.without_token('id', $1), tollgate.without_token('jwks_url', $3);
    IF $2 IS NOT NULL THEN
        PERFORM tollgate.check_json('jwks', $2, 262144, 10);
    END IF;
    IF $2 IS NOT NULL AND $3 IS NOT NULL THEN
        RAISE EXCEPTION 'the keys of a service account are given or fetched, not both'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: jwks_url, which is given together with jwks.',
                  HINT = 'Leave one of them NULL; or both, and the account has no keys.';
    END IF;
    address := tollgate.webhook_url($3);
    IF $3 IS NOT NULL AND address IS NULL THEN
        RAISE EXCEPTION 'this is not an address that keys can be fetched from'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: jwks_url.',
                  HINT = 'Give https://host/path, at most 2000 characters, without user, password and fragment; or the keys themselves as jwks.';
    END IF;
    -- The daemon asks for those that are due each second.
    IF address IS NOT NULL AND (SELECT count(*) FROM tollgate.services s WHERE s.jwks_url IS NOT NULL AND s.id <> $1) >= 1000 THEN
        RAISE EXCEPTION 'there are 1000 service accounts whose keys are fetched, which is as many as there may be'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = 'Argument: jwks_url.', HINT = 'Give the keys themselves as jwks.';
    END IF;
    account := tollgate.lock_service($1);
    -- Those that came from elsewhere go.
    IF address IS NULL OR account.jwks_url IS DISTINCT FROM address THEN
        result := tollgate.replace_service_keys($1, $2::text);
        IF $2 IS NOT NULL AND result.stored = 0 THEN
            RAISE EXCEPTION 'there is no key in this set that can be used'
                USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: jwks. %s.', result.detail),
                      HINT = 'Pass the public JWK set of the account, {"keys": […]}, with a kid in each key.';
        END IF;
        IF result.refused > 0 THEN
            RAISE WARNING '% keys of this set are not used', result.refused
                USING DETAIL = result.detail, HINT = 'Assertions that they have signed are refused.';
        END IF;
    END IF;
    UPDATE tollgate.services s
        SET jwks_url = address, due_at = CASE WHEN address IS NOT NULL THEN now() END,
            fetched_at = CASE WHEN s.jwks_url = address THEN s.fetched_at END, tried_at = NULL, failures = 0, problem = NULL, problem_at = NULL
        WHERE s.id = $1;
END
$$;
COMMENT ON FUNCTION tollgate.set_service_account_keys(text, jsonb, text) IS
    'Replaces the keys of a service account, with which it signs assertions: given, or fetched by the daemon from jwks_url; with neither it has none. Where a key goes, the access tokens of the account end at once; event service.keys_changed';

CREATE FUNCTION tollgate.assertions_accepted_from() RETURNS timestamptz
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Where there was no other timeline, no use of an assertion can have been lost with it: creating the account was an event of one.
    SELECT tollgate.timeline_began()
        WHERE EXISTS (SELECT FROM tollgate.audit_epochs e
                      WHERE e.system_identifier <> tollgate.system_identifier() OR e.timeline <> tollgate.wal_timeline());
END;
COMMENT ON FUNCTION tollgate.assertions_accepted_from() IS
    'When this server began to write its timeline, if there was another one before: an assertion from before may have been used on that. Internal.';

CREATE FUNCTION tollgate.note_service_refusal(id text, condition text, client_ip inet) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE tollgate.service_refusals r SET at = clock_timestamp()
        WHERE r.account_id = (
            SELECT o.account_id FROM tollgate.service_refusals o
            WHERE o.account_id = $1 AND o.at NOT BETWEEN clock_timestamp() - interval '1 minute' AND clock_timestamp() FOR UPDATE SKIP LOCKED);
    IF FOUND THEN
        PERFORM tollgate.note_service('service.refused', $1, jsonb_build_object('condition', $2, 'client_ip', $3));
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.note_service_refusal(text, text, inet) IS
    'Records why a service account was refused, at most once a minute for each. Internal.';

CREATE FUNCTION tollgate.purge_assertions_after(batch_size integer, INOUT expires_at timestamptz, INOUT jti text, OUT looked_at bigint, OUT purged bigint)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
BEGIN
    expires_at := coalesce(expires_at, '-infinity');
    jti := coalesce(jti, '');
    -- Later than any leeway, and than a clock is set back.
    WITH deleted AS (
        DELETE FROM tollgate.used_assertions d
            WHERE d.ctid = ANY (ARRAY(
                SELECT o.ctid FROM tollgate.used_assertions o
                WHERE o.expires_at < now() - interval '1 hour'
                  AND (o.expires_at, o.jti) > (purge_assertions_after.expires_at, purge_assertions_after.jti COLLATE "C")
                ORDER BY o.expires_at, o.jti LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING d.expires_at, d.jti
    ), furthest AS (
        SELECT d.expires_at, d.jti FROM deleted d ORDER BY d.expires_at DESC, d.jti DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, purge_assertions_after.expires_at), coalesce(f.jti, purge_assertions_after.jti), a.number, a.number
        INTO purge_assertions_after.expires_at, purge_assertions_after.jti, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_assertions_after(integer, timestamptz, text) IS
    'A batch of purge_denials after a place (NULL: from the front): of assertions that were used. Internal.';
