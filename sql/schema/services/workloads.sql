-- Workload identity: a service account proves who it is by a token of a trusted issuer, such as that of a CI job or of a
-- pod, whose claims meet exact conditions. No secret is kept anywhere.

CREATE TABLE tollgate.service_workloads (
    account_id text        COLLATE "C" NOT NULL REFERENCES tollgate.services ON DELETE CASCADE,
    issuer     text        COLLATE "C" NOT NULL CHECK (length(issuer) BETWEEN 1 AND 255),
    id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    conditions text        NOT NULL,
    audience   text        CHECK (length(audience) BETWEEN 1 AND 255),
    trusted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    trusted_by text        NOT NULL DEFAULT tollgate.acting_role(),
    CONSTRAINT service_workloads_pkey PRIMARY KEY (account_id, issuer, id)
) USING heap;
COMMENT ON TABLE tollgate.service_workloads IS 'Workloads that are service accounts: tokens of an issuer whose claims meet conditions';
COMMENT ON COLUMN tollgate.service_workloads.conditions IS 'A JSON object: claims, by path, and the one value that each must have';
CREATE UNIQUE INDEX service_workloads_id ON tollgate.service_workloads (id);
SELECT pg_extension_config_dump('tollgate.service_workloads', '');

CREATE FUNCTION tollgate.check_workload_fields(issuer text, conditions jsonb, audience text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_workload_fields';
COMMENT ON FUNCTION tollgate.check_workload_fields(text, jsonb, text) IS 'Raises 22023 unless a workload may be trusted by these. Internal.';

CREATE FUNCTION tollgate.warn_of_conditions(issuer text, conditions jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    names   constant text[] := ARRAY(SELECT c.key FROM jsonb_object_keys($2) c (key) ORDER BY c.key);
    -- Of these, sub is made of the names of a repository and its owner, which others may register later.
    renamed constant boolean := $1 IN ('https://token.actions.githubusercontent.com', 'https://gitlab.com');
BEGIN
    IF EXISTS (SELECT FROM unnest(names) n WHERE n ~ '(^|[._/-])(id|uid|uuid|oid)$|(Id|Uid|Uuid)$' OR n ~ '(^|[.])sub$' AND NOT renamed) THEN
        RETURN;
    END IF;
    RAISE WARNING 'these conditions are on names alone: %', array_to_string(names, ', ')
        USING DETAIL = 'Who registers such a name after it was given up is this service account.',
              HINT = 'Add a condition on an id that is never given to another, such as repository_id, repository_owner_id, project_id or oid'
                  || CASE WHEN renamed THEN '; of this issuer sub is a name.' ELSE ', or on sub.' END;
END
$$;
COMMENT ON FUNCTION tollgate.warn_of_conditions(text, jsonb) IS
    'A warning unless one of these conditions is on an identifier that cannot be registered again. Internal.';

CREATE FUNCTION tollgate.trust_workload(id text, issuer text, conditions jsonb, audience text DEFAULT NULL) RETURNS uuid
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    workload uuid;
BEGIN
    PERFORM tollgate.check_workload_fields($2, $3, $4);
    PERFORM tollgate.lock_service($1);
    PERFORM FROM tollgate.issuers i WHERE i.issuer = $2 AND i.distrusted_at IS NULL FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no such trusted issuer'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: issuer, of %s.', tollgate.quote_redacted($2)),
                  HINT = 'Trust it first, with tollgate.trust_issuer(); without scopes its tokens grant nothing by themselves.';
    END IF;
    PERFORM tollgate.warn_of_conditions($2, $3);
    SELECT w.id INTO workload FROM tollgate.service_workloads w
        WHERE w.account_id = $1 AND w.issuer = $2 AND w.conditions::jsonb = $3 AND w.audience IS NOT DISTINCT FROM $4;
    IF FOUND THEN
        RETURN workload;
    END IF;
    IF (SELECT count(*) FROM tollgate.service_workloads w WHERE w.account_id = $1) >= 64 THEN
        RAISE EXCEPTION 'the service account trusts 64 workloads, which is as many as it may'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = format('Argument: id, of %s.', tollgate.quote_redacted($1)),
                  HINT = 'End the trust in one with tollgate.distrust_workload(workload_id), or use another account.';
    END IF;
    INSERT INTO tollgate.service_workloads AS w (account_id, issuer, conditions, audience) VALUES ($1, $2, $3::text, $4) RETURNING w.id INTO workload;
    PERFORM tollgate.note_service('service.workload_trusted', $1,
        jsonb_build_object('workload', workload, 'issuer', $2, 'conditions', $3, 'audience', $4));
    RETURN workload;
END
$$;
COMMENT ON FUNCTION tollgate.trust_workload(text, text, jsonb, text) IS
    'Lets tokens of a trusted issuer whose claims have exactly these values prove a service account, and returns the id of this trust: the rules of the issuer for audience, type and age hold too, and the audience must be among those of the token, if one is given. Warns where no condition is on an identifier that cannot be registered again; event service.workload_trusted; 42704 without such an account or issuer';

CREATE FUNCTION tollgate.distrust_workload(workload_id uuid, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    workload tollgate.service_workloads;
BEGIN
    $2 := tollgate.stored_reason($2);
    SELECT w.* INTO workload FROM tollgate.service_workloads w WHERE w.id = $1;
    -- The account first, as where it is deleted.
    PERFORM FROM tollgate.services s WHERE s.id = workload.account_id FOR NO KEY UPDATE;
    DELETE FROM tollgate.service_workloads w WHERE w.account_id = workload.account_id AND w.issuer = workload.issuer AND w.id = workload.id;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM tollgate.end_access_of_users(ARRAY['service:' || workload.account_id], $2, '{}');
    PERFORM tollgate.note_service('service.workload_distrusted', workload.account_id,
        jsonb_build_object('workload', $1, 'issuer', workload.issuer, 'reason', $2));
    PERFORM tollgate.notify_token_event('service.workload_distrusted', NULL, 'service:' || workload.account_id, $2, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.distrust_workload(uuid, text) IS
    'Ends a trust_workload, and the access tokens of its account at once; false if there is none; event service.workload_distrusted';

-- ---- Listing. Ids are in the order of the index, so the cost of a page depends on its size.

CREATE FUNCTION tollgate.list_service_accounts(account_id text DEFAULT NULL, max_accounts integer DEFAULT NULL, after text DEFAULT NULL) RETURNS TABLE (
        id text, user_id text, name text, description text, owner text, scopes text[], audience text[], lifetime interval,
        enabled boolean, disabled_at timestamptz, disabled_reason text, secrets bigint, kids text[], jwks_url text, keys_fetched_at timestamptz,
        failures integer, problem text, workloads jsonb, last_used_at timestamptz, created_at timestamptz, created_by text)
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 20
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
BEGIN ATOMIC
    SELECT tollgate.without_token('account_id', $1), tollgate.without_token('after', $3);
    SELECT s.id, 'service:' || s.id, s.name, s.description, s.owner, s.scopes, s.audience, make_interval(secs => s.lifetime),
           s.disabled_at IS NULL, s.disabled_at, s.disabled_reason,
           (SELECT count(*) FROM tollgate.api_tokens t
                WHERE t.user_id = 'service:' || s.id COLLATE "default" AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())),
           ARRAY(SELECT k.kid FROM tollgate.service_keys k WHERE k.account_id = s.id ORDER BY k.kid), s.jwks_url, s.fetched_at, s.failures, s.problem,
           coalesce((SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                         'id', w.id, 'issuer', w.issuer, 'audience', w.audience)) || jsonb_build_object('conditions', w.conditions::jsonb) ORDER BY w.issuer, w.id)
                     FROM tollgate.service_workloads w WHERE w.account_id = s.id), '[]'),
           (SELECT max(u.last_used_at) FROM tollgate.token_usage u
                -- One list, which an index is asked for.
                WHERE u.token_id = ANY (ARRAY(SELECT t.id FROM tollgate.api_tokens t WHERE t.user_id = 'service:' || s.id COLLATE "default")
                                        || tollgate.usage_id_of_user('service:' || s.id))),
           s.created_at, s.created_by
        FROM tollgate.services s
        WHERE s.id >= coalesce($1, '') COLLATE "C" AND s.id <= coalesce($1, '~') COLLATE "C" AND s.id > coalesce($3, '') COLLATE "C"
        ORDER BY s.id LIMIT $2;
END;
COMMENT ON FUNCTION tollgate.list_service_accounts(text, integer, text) IS
    'The rows of the view service_accounts: all, the one with an id, or a page of at most max_accounts after an id';

CREATE VIEW tollgate.service_accounts AS
    SELECT a.id, a.user_id, a.name, a.description, a.owner, a.scopes, a.audience, a.lifetime, a.enabled, a.disabled_at, a.disabled_reason,
           a.secrets, a.kids, a.jwks_url, a.keys_fetched_at, a.failures, a.problem, a.workloads, a.last_used_at, a.created_at, a.created_by
    FROM tollgate.list_service_accounts() a;
COMMENT ON VIEW tollgate.service_accounts IS
    'Service accounts: what their access tokens may have at most, by how many secrets, which keys and which workloads they prove themselves, and when one or its access tokens were last used, as of the last flush';

-- ---- Keys that are fetched, by the functions for those of trusted issuers (issuers.sql), under the name service:<id>.

CREATE FUNCTION tollgate.services_due(OUT issuer text, OUT jwks_url text, OUT reason text, OUT tried_at timestamptz) RETURNS SETOF record
    LANGUAGE sql VOLATILE PARALLEL UNSAFE ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- A time further away than any that is set here comes of a clock that was set back.
    SELECT 'service:' || s.id, s.jwks_url,
           CASE WHEN s.tried_at IS NULL THEN 'new' WHEN s.due_at > c.now AND s.due_at < c.now + interval '2 hours' THEN 'unknown key'
                WHEN s.failures > 0 THEN 'failed' ELSE 'age' END, s.tried_at
        FROM tollgate.services s, (SELECT clock_timestamp() AS now) c
        WHERE s.jwks_url IS NOT NULL
          AND (s.due_at <= c.now OR s.due_at > c.now + interval '2 hours'
               OR s.tried_at <= c.now - interval '1 minute' AND tollgate.unknown_key_at('service:' || s.id) > s.tried_at)
        ORDER BY s.tried_at NULLS FIRST, s.id LIMIT 100;
END;
COMMENT ON FUNCTION tollgate.services_due() IS 'The service accounts whose keys are to be fetched now, as issuers_due has them. Internal.';

CREATE FUNCTION tollgate.note_service_keys_failure(id text, problem text) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE tollgate.services s
        SET tried_at = clock_timestamp(), failures = least(s.failures, 1000000) + 1, problem = coalesce($2, 'unknown'), problem_at = clock_timestamp(),
            due_at = clock_timestamp() + least(interval '5 seconds' * 2 ^ least(s.failures + 1, 10), interval '15 minutes')
        WHERE s.id = $1 AND s.jwks_url IS NOT NULL;
END;
COMMENT ON FUNCTION tollgate.note_service_keys_failure(text, text) IS 'note_issuer_failure of a service account; the problem is one that may be stored. Internal.';

CREATE FUNCTION tollgate.store_service_keys(id text, jwks text, max_age interval, fetched_from text, OUT stored integer, OUT refused integer, OUT detail text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    result record;
BEGIN
    PERFORM FROM tollgate.services s WHERE s.id = $1 AND s.jwks_url IS NOT NULL AND ($4 IS NULL OR s.jwks_url = $4) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        stored := 0;
        refused := 0;
        detail := 'there is no service account of this name whose keys are fetched from there';
        RETURN;
    END IF;
    result := tollgate.replace_service_keys($1, coalesce($2, ''));
    stored := result.stored;
    refused := result.refused;
    detail := result.detail;
    IF stored = 0 THEN
        PERFORM tollgate.note_service_keys_failure($1, detail);
        RETURN;
    END IF;
    UPDATE tollgate.services s
        SET fetched_at = clock_timestamp(), tried_at = clock_timestamp(), failures = 0,
            problem = result.detail, problem_at = CASE WHEN result.detail IS NOT NULL THEN clock_timestamp() END,
            due_at = clock_timestamp() + least(greatest(coalesce($3, interval '1 hour'), interval '1 minute'), interval '1 hour')
        WHERE s.id = $1;
END
$$;
COMMENT ON FUNCTION tollgate.store_service_keys(text, text, interval, text) IS 'store_issuer_keys of a service account. Internal.';
