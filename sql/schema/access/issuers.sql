-- Trusted issuers: identity providers whose signed tokens are accepted here, and what may come of one. A verification
-- reads both tables each time, by the latest snapshot and by column numbers (extension/src/store/issuers.rs).
--
-- A key belongs to an issuer: it is found by issuer and kid together, so two issuers may have the same kid, and nothing
-- that one of them publishes concerns the other. The keys are given, or fetched by the daemon; no session here opens a
-- network connection.
--
-- An issuer is trusted within bounds that it cannot leave: its users begin with a prefix that no other issuer has, its
-- scopes are among those that were named, its tokens are for audiences that were named, and old ones are refused.

CREATE TABLE tollgate.issuers (
    issuer          text        COLLATE "C" NOT NULL CONSTRAINT issuers_pkey PRIMARY KEY CHECK (length(issuer) BETWEEN 1 AND 255),
    user_prefix     text        COLLATE "C" NOT NULL CHECK (length(user_prefix) <= 64),
    audience        text[]      NOT NULL CHECK (cardinality(audience) > 0),
    algorithms      text[]      NOT NULL CHECK (cardinality(algorithms) > 0),
    types           text[],
    user_claim      text        NOT NULL,
    scope_claims    text[]      NOT NULL,
    scopes          text[]      NOT NULL,
    required_claims text        NOT NULL,
    max_lifetime    integer     NOT NULL CHECK (max_lifetime BETWEEN 60 AND 604800),
    accepts_from    timestamptz,
    other_prefixes  text[]      NOT NULL DEFAULT '{}',
    distrusted_at   timestamptz,
    keys_given      boolean     NOT NULL,
    jwks_url        text,
    trusted_at      timestamptz NOT NULL DEFAULT now(),
    trusted_by      text        NOT NULL DEFAULT tollgate.acting_role(),
    fetched_at      timestamptz,
    tried_at        timestamptz,
    due_at          timestamptz,
    failures        integer     NOT NULL DEFAULT 0,
    problem         text,
    problem_at      timestamptz
) USING heap;
COMMENT ON TABLE tollgate.issuers IS 'Issuers whose tokens are accepted, with what may come of one; and for some days those that were trusted before';
COMMENT ON COLUMN tollgate.issuers.required_claims IS 'A JSON object: claims, by path, and the one value of each that is accepted';
COMMENT ON COLUMN tollgate.issuers.max_lifetime IS 'How long after its iat a token is accepted at most, in seconds';
COMMENT ON COLUMN tollgate.issuers.accepts_from IS 'When it was distrusted last: tokens that are not clearly newer are refused';
COMMENT ON COLUMN tollgate.issuers.other_prefixes IS 'Of the issuer whose prefix is empty: the prefixes of the others, whose users it must not name';
COMMENT ON COLUMN tollgate.issuers.distrusted_at IS 'Since when its tokens are refused; NULL while it is trusted';
COMMENT ON COLUMN tollgate.issuers.keys_given IS 'Whether its keys were given with it; else they are fetched, from jwks_url or, without one, from where its discovery document says';
COMMENT ON COLUMN tollgate.issuers.tried_at IS 'When fetching its keys last ended, well or not';
COMMENT ON COLUMN tollgate.issuers.failures IS 'How often fetching has failed since it last succeeded';
SELECT pg_extension_config_dump('tollgate.issuers', '');

CREATE TABLE tollgate.issuer_keys (
    issuer     text        COLLATE "C" NOT NULL REFERENCES tollgate.issuers ON DELETE CASCADE,
    kid        text        COLLATE "C" NOT NULL CHECK (octet_length(kid) BETWEEN 1 AND 256),
    algorithm  text        COLLATE "C" NOT NULL CHECK (algorithm IN ('ES256', 'EdDSA', 'RS256')),
    jwk        text        NOT NULL CHECK (octet_length(jwk) <= 4096),
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT issuer_keys_pkey PRIMARY KEY (issuer, kid)
) USING heap;
COMMENT ON TABLE tollgate.issuer_keys IS 'Public keys of trusted issuers, as their key sets had them last';
SELECT pg_extension_config_dump('tollgate.issuer_keys', '');

CREATE FUNCTION tollgate.check_issuer_fields(
    issuer text, user_prefix text, audience text[], scopes text[], user_claim text, scope_claims text[], algorithms text[], types text[],
    required_claims jsonb, max_lifetime interval
) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_issuer_fields';
COMMENT ON FUNCTION tollgate.check_issuer_fields(text, text, text[], text[], text, text[], text[], text[], jsonb, interval) IS
    'Raises 22023 unless an issuer may be trusted with these fields. Internal.';

CREATE FUNCTION tollgate.read_jwks(jwks text, algorithms text[]) RETURNS TABLE (kid text, algorithm text, jwk text, problem text)
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE ROWS 5
    AS 'MODULE_PATHNAME', 'read_jwks_wrapper';
COMMENT ON FUNCTION tollgate.read_jwks(text, text[]) IS
    'The keys of a JWK set that verify signatures by one of these algorithms, and in a row without a jwk the problem of each other one, or that of the set. Internal.';

CREATE FUNCTION tollgate.unknown_key_at(issuer text) RETURNS timestamptz
    LANGUAGE c VOLATILE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'unknown_key_at';
COMMENT ON FUNCTION tollgate.unknown_key_at(text) IS
    'When this server was last shown a token of an issuer by a key that the issuer does not have; NULL if never, or if that was forgotten. Internal.';

CREATE FUNCTION tollgate.replace_issuer_keys(issuer text, jwks text, OUT stored integer, OUT refused integer, OUT detail text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    accepted text[];
    came     text[];
    went     text[];
BEGIN
    SELECT i.algorithms INTO accepted FROM tollgate.issuers i WHERE i.issuer = $1;
    SELECT count(k.jwk), count(*) - count(k.jwk), left(string_agg(k.problem, '; '), 1000)
        INTO stored, refused, detail FROM tollgate.read_jwks($2, accepted) k;
    -- An issuer without keys issues nothing: more likely this is not its key set.
    IF stored = 0 THEN
        detail := coalesce(detail, 'the key set is empty');
        RETURN;
    END IF;
    WITH removed AS (
        DELETE FROM tollgate.issuer_keys o
            WHERE o.issuer = $1
              AND NOT EXISTS (SELECT FROM tollgate.read_jwks($2, accepted) k WHERE k.kid = o.kid AND k.jwk = o.jwk)
            RETURNING o.kid
    )
    SELECT array_agg(r.kid ORDER BY r.kid) INTO went FROM removed r;
    WITH added AS (
        INSERT INTO tollgate.issuer_keys AS o (issuer, kid, algorithm, jwk)
            SELECT $1, k.kid, k.algorithm, k.jwk FROM tollgate.read_jwks($2, accepted) k WHERE k.jwk IS NOT NULL
            ON CONFLICT ON CONSTRAINT issuer_keys_pkey DO NOTHING
            RETURNING o.kid
    )
    SELECT array_agg(a.kid ORDER BY a.kid) INTO came FROM added a;
    IF came IS NULL AND went IS NULL THEN
        RETURN;
    END IF;
    -- One key under the kid of another one is in both lists.
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('issuer.keys_changed', jsonb_build_object('issuer', $1, 'keys', replace_issuer_keys.stored,
                'came', to_jsonb(coalesce(came[1:50], '{}')), 'went', to_jsonb(coalesce(went[1:50], '{}'))));
    IF went IS NOT NULL THEN
        PERFORM tollgate.notify_token_event('issuer.keys_changed', NULL, NULL, NULL, NULL);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.replace_issuer_keys(text, text) IS
    'Makes the keys of an issuer those of a JWK set, unless that has none that can be used; returns how many were stored and left out, and why. Internal.';

CREATE FUNCTION tollgate.issuer_detail(issuer text) RETURNS jsonb
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_build_object(
            'user_prefix', i.user_prefix, 'audience', i.audience, 'scopes', i.scopes, 'user_claim', i.user_claim,
            'scope_claims', i.scope_claims, 'algorithms', i.algorithms, 'types', i.types, 'required_claims', i.required_claims::jsonb,
            'max_lifetime', i.max_lifetime, 'keys_given', i.keys_given, 'jwks_url', i.jwks_url)
        FROM tollgate.issuers i WHERE i.issuer = $1 AND i.distrusted_at IS NULL;
END;
COMMENT ON FUNCTION tollgate.issuer_detail(text) IS 'How an issuer is trusted, for events; NULL if it is not. Internal.';

CREATE FUNCTION tollgate.settle_prefixes() RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE tollgate.issuers i SET other_prefixes = o.prefixes
        FROM (SELECT coalesce(array_agg(n.user_prefix ORDER BY n.user_prefix), '{}') AS prefixes
              FROM tollgate.issuers n WHERE n.user_prefix <> '' AND n.distrusted_at IS NULL) o
        WHERE i.user_prefix = '' AND i.other_prefixes IS DISTINCT FROM o.prefixes;
END;
COMMENT ON FUNCTION tollgate.settle_prefixes() IS 'Gives the issuer whose prefix is empty the prefixes of the others. Internal.';

CREATE FUNCTION tollgate.lock_issuers() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- With a snapshot older than the lock, an issuer that was just trusted would be invisible.
    PERFORM tollgate.check_read_committed('issuers cannot be changed', 'It may not see those that were just trusted.', 'Change them');
    LOCK TABLE tollgate.issuers IN SHARE ROW EXCLUSIVE MODE;
    -- Their latest tokens are over.
    DELETE FROM tollgate.issuers i WHERE i.distrusted_at < now() - interval '8 days';
END
$$;
COMMENT ON FUNCTION tollgate.lock_issuers() IS
    'Has other changes of issuers wait until this transaction ends, and forgets those that were distrusted long ago. Internal.';

CREATE FUNCTION tollgate.check_prefix(issuer text, user_prefix text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    other tollgate.issuers;
BEGIN
    SELECT i.* INTO other FROM tollgate.issuers i
        WHERE i.issuer <> $1 AND i.distrusted_at IS NULL
          AND CASE WHEN $2 = '' OR i.user_prefix = '' THEN $2 = i.user_prefix
                   ELSE starts_with($2, i.user_prefix) OR starts_with(i.user_prefix, $2) END
        ORDER BY i.issuer LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'a user of this issuer could be taken for one of another issuer'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: user_prefix, of %L, while issuer %s has %L.', $2, other.issuer, other.user_prefix),
                  HINT = 'Give each issuer a prefix of its own, of which none begins with another one, such as "auth0:"; one issuer may have the empty prefix.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_prefix(text, text) IS 'Raises 22023 if users of two issuers could have the same user id. Internal.';

CREATE FUNCTION tollgate.check_key_source(issuer text, jwks jsonb, jwks_url text) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address constant text := tollgate.webhook_url(coalesce($3, $1));
BEGIN
    IF $2 IS NOT NULL AND $3 IS NOT NULL THEN
        RAISE EXCEPTION 'the keys of an issuer are given or fetched, not both'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: jwks_url, which is given together with jwks.',
                  HINT = 'Leave one of them NULL; or both, and the address is read from the discovery document of the issuer.';
    END IF;
    IF $2 IS NULL AND address IS NULL THEN
        RAISE EXCEPTION 'this is not an address that keys can be fetched from'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: %s.', CASE WHEN $3 IS NULL THEN 'issuer' ELSE 'jwks_url' END),
                  HINT = 'Give https://host/path, at most 2000 characters, without user, password and fragment; or the keys themselves as jwks.';
    END IF;
    RETURN CASE WHEN $3 IS NOT NULL THEN address END;
END
$$;
COMMENT ON FUNCTION tollgate.check_key_source(text, jsonb, text) IS
    'The address of the key set in its normal form, if one was given; raises 22023 unless the keys are given, or can be fetched. Internal.';

CREATE FUNCTION tollgate.trust_issuer(
    issuer          text,
    user_prefix     text,
    audience        text[],
    jwks            jsonb    DEFAULT NULL,
    jwks_url        text     DEFAULT NULL,
    scopes          text[]   DEFAULT '{}',
    user_claim      text     DEFAULT 'sub',
    scope_claims    text[]   DEFAULT '{scope,scp}',
    algorithms      text[]   DEFAULT '{RS256,ES256,EdDSA}',
    types           text[]   DEFAULT NULL,
    required_claims jsonb    DEFAULT '{}',
    max_lifetime    interval DEFAULT '1 day'
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address text;
    known   tollgate.issuers;
    before  jsonb;
    after   jsonb;
    changes jsonb;
    stored  record;
BEGIN
    IF $4 IS NOT NULL THEN
        PERFORM tollgate.check_json('jwks', $4, 262144, 10);
    END IF;
    PERFORM tollgate.check_issuer_fields($1, $2, $3, $6, $7, $8, $9, $10, $11, $12);
    address := tollgate.check_key_source($1, $4, $5);
    IF regexp_replace($7, '^.*[.]', '') IN ('email', 'preferred_username', 'username', 'upn', 'unique_name', 'nickname', 'name', 'phone_number') THEN
        RAISE WARNING 'the claim % may pass from one user to another', quote_ident($7)
            USING DETAIL = 'A user who gets a name or an address that another one had also gets what that one may do here.',
                  HINT = 'Name users by sub, or by an id of your provider that is never used again.';
    END IF;
    PERFORM tollgate.lock_issuers();
    PERFORM tollgate.check_prefix($1, $2);
    SELECT i.* INTO known FROM tollgate.issuers i WHERE i.issuer = $1;
    before := tollgate.issuer_detail($1);
    IF known.issuer IS NULL AND (SELECT count(*) FROM tollgate.issuers) >= 1000 THEN
        RAISE EXCEPTION 'there are 1000 issuers, which is as many as there may be'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = 'Those that were distrusted within the last 8 days count.',
                  HINT = 'End the trust in one with tollgate.distrust_issuer(issuer).';
    END IF;

    INSERT INTO tollgate.issuers AS i (issuer, user_prefix, audience, algorithms, types, user_claim, scope_claims, scopes, required_claims,
                                       max_lifetime, keys_given, jwks_url, due_at)
        VALUES ($1, $2, $3, $9, $10, $7, $8, $6, $11::text, extract(epoch FROM $12)::integer, $4 IS NOT NULL, address,
                CASE WHEN $4 IS NULL THEN now() END)
        ON CONFLICT ON CONSTRAINT issuers_pkey DO UPDATE
            SET user_prefix = excluded.user_prefix, audience = excluded.audience, algorithms = excluded.algorithms, types = excluded.types,
                user_claim = excluded.user_claim, scope_claims = excluded.scope_claims, scopes = excluded.scopes,
                required_claims = excluded.required_claims, max_lifetime = excluded.max_lifetime,
                accepts_from = greatest(i.accepts_from, i.distrusted_at), other_prefixes = '{}', distrusted_at = NULL,
                keys_given = excluded.keys_given, jwks_url = excluded.jwks_url, due_at = excluded.due_at,
                trusted_at = CASE WHEN i.distrusted_at IS NULL THEN i.trusted_at ELSE excluded.trusted_at END,
                trusted_by = CASE WHEN i.distrusted_at IS NULL THEN i.trusted_by ELSE excluded.trusted_by END,
                tried_at = NULL, failures = 0, problem = NULL, problem_at = NULL;
    PERFORM tollgate.settle_prefixes();
    after := tollgate.issuer_detail($1);
    IF before IS NULL THEN
        INSERT INTO tollgate.audit_log (event, detail) VALUES ('issuer.trusted', jsonb_build_object('issuer', $1) || jsonb_strip_nulls(after));
    ELSE
        SELECT jsonb_object_agg(a.key, jsonb_build_object('from', b.value, 'to', a.value)) INTO changes
            FROM jsonb_each(after) a JOIN jsonb_each(before) b ON b.key = a.key AND b.value <> a.value;
        IF changes IS NOT NULL THEN
            INSERT INTO tollgate.audit_log (event, detail) VALUES ('issuer.changed', jsonb_build_object('issuer', $1, 'changes', changes));
            PERFORM tollgate.notify_token_event('issuer.changed', NULL, NULL, NULL, NULL);
        END IF;
    END IF;

    IF $4 IS NOT NULL THEN
        stored := tollgate.replace_issuer_keys($1, $4::text);
        IF stored.stored = 0 THEN
            RAISE EXCEPTION 'there is no key in this set that can be used'
                USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: jwks. %s.', stored.detail),
                      HINT = 'Pass the JWK set that the issuer publishes, {"keys": […]}, with a kid in each key; only public ones, and by one of the algorithms.';
        END IF;
        IF stored.refused > 0 THEN
            RAISE WARNING '% keys of this set are not used', stored.refused
                USING DETAIL = stored.detail, HINT = 'Tokens that they have signed are refused (UNKNOWN_KEY).';
        END IF;
        UPDATE tollgate.issuers i SET fetched_at = clock_timestamp() WHERE i.issuer = $1;
    ELSIF known.keys_given OR known.jwks_url IS DISTINCT FROM address THEN
        -- They came from elsewhere.
        DELETE FROM tollgate.issuer_keys k WHERE k.issuer = $1;
        UPDATE tollgate.issuers i SET fetched_at = NULL WHERE i.issuer = $1;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.trust_issuer(text, text, text[], jsonb, text, text[], text, text[], text[], text[], jsonb, interval) IS
    'Accepts the signed tokens of an issuer, for these audiences: their users get the prefix, their scopes are at most these. Its keys are given, or fetched by the daemon, from jwks_url or by discovery. For an issuer that is trusted already it replaces all of this; events issuer.trusted, issuer.changed, issuer.keys_changed';

CREATE FUNCTION tollgate.distrust_issuer(issuer text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('issuer', $1);
    $2 := tollgate.stored_reason($2);
    PERFORM tollgate.lock_issuers();
    UPDATE tollgate.issuers i
        SET distrusted_at = clock_timestamp(), other_prefixes = '{}', fetched_at = NULL, tried_at = NULL, due_at = NULL,
            failures = 0, problem = NULL, problem_at = NULL
        WHERE i.issuer = $1 AND i.distrusted_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM tollgate.issuer_keys k WHERE k.issuer = $1;
    PERFORM tollgate.settle_prefixes();
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('issuer.distrusted', jsonb_strip_nulls(jsonb_build_object('issuer', $1, 'reason', $2)));
    PERFORM tollgate.notify_token_event('issuer.distrusted', NULL, NULL, $2, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.distrust_issuer(text, text) IS
    'Refuses all tokens of an issuer, at once; those that it has issued until now stay refused when it is trusted again; event issuer.distrusted. False if it was not trusted';

CREATE FUNCTION tollgate.list_trusted_issuers() RETURNS TABLE (
        issuer text, user_prefix text, audience text[], scopes text[], user_claim text, scope_claims text[], algorithms text[], types text[],
        required_claims jsonb, max_lifetime interval, keys_from text, jwks_url text, keys bigint, kids text[], fetched_at timestamptz,
        due_at timestamptz, failures integer, problem text, problem_at timestamptz, accepts_from timestamptz, trusted_at timestamptz,
        trusted_by text)
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT i.issuer, i.user_prefix, i.audience, i.scopes, i.user_claim, i.scope_claims, i.algorithms, i.types, i.required_claims::jsonb,
           make_interval(secs => i.max_lifetime),
           CASE WHEN i.keys_given THEN 'given' WHEN i.jwks_url IS NULL THEN 'discovery' ELSE 'jwks_url' END, i.jwks_url,
           cardinality(k.kids)::bigint, k.kids, i.fetched_at, i.due_at, i.failures, i.problem, i.problem_at, i.accepts_from,
           i.trusted_at, i.trusted_by
        FROM tollgate.issuers i,
             LATERAL (SELECT coalesce(array_agg(n.kid ORDER BY n.kid), '{}') AS kids FROM tollgate.issuer_keys n WHERE n.issuer = i.issuer) k
        WHERE i.distrusted_at IS NULL
        ORDER BY i.issuer;
END;
COMMENT ON FUNCTION tollgate.list_trusted_issuers() IS 'The rows of the view trusted_issuers';

CREATE VIEW tollgate.trusted_issuers AS
    SELECT i.issuer, i.user_prefix, i.audience, i.scopes, i.user_claim, i.scope_claims, i.algorithms, i.types, i.required_claims,
           i.max_lifetime, i.keys_from, i.jwks_url, i.keys, i.kids, i.fetched_at, i.due_at, i.failures, i.problem, i.problem_at,
           i.accepts_from, i.trusted_at, i.trusted_by
    FROM tollgate.list_trusted_issuers() i;
COMMENT ON VIEW tollgate.trusted_issuers IS
    'The issuers whose tokens are accepted: how, and with how many keys, since when those are known, when they are fetched again, and the last problem with that';

CREATE FUNCTION tollgate.issuer_faults() RETURNS TABLE (severity text, detail text, remedy text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE ROWS 1
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT 'fail', 'there are issuers or service accounts whose keys are to be fetched, and no role has the capability for that',
            format('SELECT tollgate.grant_capability(%L, ''key_fetcher'');', quote_ident(tollgate.acting_role()))
        WHERE (EXISTS (SELECT FROM tollgate.list_trusted_issuers() i WHERE i.keys_from <> 'given')
               OR EXISTS (SELECT FROM tollgate.services s WHERE s.jwks_url IS NOT NULL))
          AND NOT has_function_privilege(tollgate.acting_role()::name, 'tollgate.store_issuer_keys(text, text, interval, text)', 'EXECUTE')
          AND NOT EXISTS (SELECT FROM tollgate.capabilities c WHERE c.capability = 'key_fetcher');
    RETURN QUERY SELECT CASE WHEN f.keys = 0 THEN 'fail' ELSE 'warn' END,
            CASE WHEN f.keys = 0 THEN format('the keys of issuer %s were never fetched, so its tokens are refused', f.issuer)
                 WHEN f.failures >= 3 THEN format('the keys of issuer %s could not be fetched %s times', f.issuer, f.failures)
                 WHEN f.age > interval '2 hours' THEN format('the keys of issuer %s were last fetched %s ago', f.issuer, date_trunc('second', f.age))
                 ELSE format('keys of issuer %s are left out', f.issuer) END || coalesce('. ' || f.problem, ''),
            CASE WHEN f.failures = 0 AND f.problem IS NOT NULL THEN 'have the issuer correct its key set, or accept its algorithms (trust_issuer)'
                 ELSE 'tollgated issuer fetch (by a role with the capability key_fetcher, as tollgated run does it)' END
        FROM (SELECT i.*, clock_timestamp() - i.fetched_at AS age FROM tollgate.list_trusted_issuers() i WHERE i.keys_from <> 'given') f
        WHERE f.keys = 0 OR f.failures >= 3 OR f.age > interval '2 hours' OR f.failures = 0 AND f.problem IS NOT NULL;
    RETURN QUERY SELECT 'warn',
            CASE WHEN s.fetched_at IS NULL THEN format('the keys of service account %s were never fetched, so its assertions are refused', s.id)
                 WHEN s.failures >= 3 THEN format('the keys of service account %s could not be fetched %s times', s.id, s.failures)
                 ELSE format('keys of service account %s are left out', s.id) END || coalesce('. ' || s.problem, ''),
            CASE WHEN s.failures = 0 AND s.problem IS NOT NULL THEN 'have the account''s owner correct its key set'
                 ELSE 'tollgated issuer fetch (by a role with the capability key_fetcher, as tollgated run does it)' END
        FROM tollgate.services s
        WHERE s.jwks_url IS NOT NULL AND (s.fetched_at IS NULL OR s.failures >= 3 OR s.failures = 0 AND s.problem IS NOT NULL)
        ORDER BY s.id;
END
$$;
COMMENT ON FUNCTION tollgate.issuer_faults() IS 'Findings about the keys of trusted issuers and service accounts, for deployment_health. Internal.';

-- For the daemon, which fetches the keys; a capability of its own. One who stores keys can sign as the issuer, so an
-- operator alone cannot.

CREATE FUNCTION tollgate.issuers_due(OUT issuer text, OUT jwks_url text, OUT reason text) RETURNS SETOF record
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    now constant timestamptz := clock_timestamp();
BEGIN
    -- A time further away than any that is set here comes of a clock that was set back.
    RETURN QUERY SELECT d.issuer, d.jwks_url, d.reason FROM (
        SELECT i.issuer, i.jwks_url,
               CASE WHEN i.tried_at IS NULL THEN 'new' WHEN i.due_at > now AND i.due_at < now + interval '2 hours' THEN 'unknown key'
                    WHEN i.failures > 0 THEN 'failed' ELSE 'age' END AS reason, i.tried_at
            FROM tollgate.issuers i
            WHERE NOT i.keys_given AND i.distrusted_at IS NULL
              AND (i.due_at <= now OR i.due_at > now + interval '2 hours'
                   OR i.tried_at <= now - interval '1 minute' AND tollgate.unknown_key_at(i.issuer) > i.tried_at)
        UNION ALL
        SELECT s.issuer, s.jwks_url, s.reason, s.tried_at FROM tollgate.services_due() s) d
        ORDER BY d.tried_at NULLS FIRST, d.issuer LIMIT 100;
END
$$;
COMMENT ON FUNCTION tollgate.issuers_due() IS
    'The issuers, and as service:<id> the service accounts, whose keys are to be fetched now, those first that were not tried for the longest time, and why: new, age, failed, or unknown key, which is so at most once a minute for each. Without jwks_url the address is in the discovery document of the issuer';

CREATE FUNCTION tollgate.note_issuer_failure(issuer text, problem text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('issuer', $1);
    -- What a server answered may be in it, and so anything.
    $2 := left(regexp_replace(left($2, 4000), '[0-9A-Fa-f]{16,}|eyJ[A-Za-z0-9_.-]{16,}|[[:cntrl:]]+', '…', 'g'), 500);
    IF starts_with($1, 'service:') THEN
        PERFORM tollgate.note_service_keys_failure(substr($1, 9), $2);
        RETURN;
    END IF;
    UPDATE tollgate.issuers i
        SET tried_at = clock_timestamp(), failures = least(i.failures, 1000000) + 1, problem = coalesce($2, 'unknown'),
            problem_at = clock_timestamp(),
            -- 10 seconds, 20, 40, and at most 15 minutes.
            due_at = clock_timestamp() + least(interval '5 seconds' * 2 ^ least(i.failures + 1, 10), interval '15 minutes')
        WHERE i.issuer = $1 AND NOT i.keys_given AND i.distrusted_at IS NULL;
END
$$;
COMMENT ON FUNCTION tollgate.note_issuer_failure(text, text) IS
    'Notes that the keys of an issuer could not be fetched, and why: its earlier keys stay, and it is tried again after 10 seconds, later every 15 minutes';

CREATE FUNCTION tollgate.store_issuer_keys(
    issuer       text,
    jwks         text,
    max_age      interval DEFAULT NULL,
    fetched_from text     DEFAULT NULL,
    OUT stored integer, OUT refused integer, OUT detail text
)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    result record;
BEGIN
    PERFORM tollgate.without_token('issuer', $1), tollgate.without_token('jwks', $2), tollgate.without_token('fetched_from', $4);
    IF starts_with($1, 'service:') THEN
        SELECT s.stored, s.refused, s.detail INTO stored, refused, detail FROM tollgate.store_service_keys(substr($1, 9), $2, $3, $4) s;
        RETURN;
    END IF;
    -- Before the row: a change of issuers locks the table first.
    LOCK TABLE tollgate.issuers IN ROW EXCLUSIVE MODE;
    -- An answer of an address that was replaced meanwhile comes too late.
    PERFORM FROM tollgate.issuers i
        WHERE i.issuer = $1 AND NOT i.keys_given AND i.distrusted_at IS NULL AND ($4 IS NULL OR i.jwks_url = $4) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        stored := 0;
        refused := 0;
        detail := 'there is no issuer of this name whose keys are fetched from there';
        RETURN;
    END IF;
    result := tollgate.replace_issuer_keys($1, coalesce($2, ''));
    stored := result.stored;
    refused := result.refused;
    detail := result.detail;
    IF stored = 0 THEN
        PERFORM tollgate.note_issuer_failure($1, detail);
        RETURN;
    END IF;
    UPDATE tollgate.issuers i
        SET fetched_at = clock_timestamp(), tried_at = clock_timestamp(), failures = 0,
            problem = result.detail, problem_at = CASE WHEN result.detail IS NOT NULL THEN clock_timestamp() END,
            due_at = clock_timestamp() + least(greatest(coalesce($3, interval '1 hour'), interval '1 minute'), interval '1 hour')
        WHERE i.issuer = $1;
END
$$;
COMMENT ON FUNCTION tollgate.store_issuer_keys(text, text, interval, text) IS
    'Replaces the keys of an issuer by those of the JWK set that was fetched, and returns how many were stored and left out, and why; a set without any that can be used changes nothing and counts as a failure, and one that was fetched_from an address that was replaced since changes nothing. It is due again after max_age, within 1 minute and 1 hour; event issuer.keys_changed';
