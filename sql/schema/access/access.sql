-- Signed access tokens: issued without a row, verified by their signature, and revoked by what is stored here. A
-- verification looks at these tables each time, by the latest snapshot (extension/src/access/).
--
-- Nothing that was issued is stored, so nothing can be marked as revoked. Instead a token that is revoked is listed, and
-- a user whose tokens are revoked gets a new mark. A token repeats the mark that its user had when it was issued; while
-- the user has a mark, only tokens with exactly that one are accepted. Marks are random, so that no rollback, restore or
-- switch-over makes two of them equal, and no clock decides which tokens are older. Tokens of trusted issuers repeat no
-- mark: of those the time decides, of the revocation here and of the issue there.

CREATE TYPE tollgate.issued_access_token AS (
    access_token text,
    jti          uuid,
    expires_at   timestamptz,
    scopes       text[],
    audience     text[]
);
COMMENT ON TYPE tollgate.issued_access_token IS 'A newly issued access token, which is not stored';

-- The primary keys are compared byte by byte, as a verification does (extension/src/access/revocations.rs), which finds the columns by number.
CREATE TABLE tollgate.denied_access_tokens (
    issuer     text COLLATE "C" NOT NULL CHECK (length(issuer) BETWEEN 1 AND 255),
    jti        text COLLATE "C" NOT NULL CHECK (length(jti) BETWEEN 1 AND 255),
    expires_at timestamptz      NOT NULL,
    denied_at  timestamptz      NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT denied_access_tokens_pkey PRIMARY KEY (issuer, jti)
) USING heap;
COMMENT ON TABLE tollgate.denied_access_tokens IS 'Access tokens that were revoked one by one';
COMMENT ON COLUMN tollgate.denied_access_tokens.expires_at IS 'When the token ends by itself, or at the latest could; purged a day later';
CREATE INDEX denied_access_tokens_expires ON tollgate.denied_access_tokens (expires_at, jti);
SELECT pg_extension_config_dump('tollgate.denied_access_tokens', '');

CREATE TABLE tollgate.revoked_users (
    user_id    text COLLATE "C" NOT NULL CONSTRAINT revoked_users_pkey PRIMARY KEY CHECK (length(user_id) BETWEEN 1 AND 255),
    mark       bigint           NOT NULL CHECK (mark > 0),
    revoked_at timestamptz      NOT NULL
) USING heap;
COMMENT ON TABLE tollgate.revoked_users IS
    'Users whose access tokens and sessions were revoked as a whole, for as long as one of the tokens could still be in use';
COMMENT ON COLUMN tollgate.revoked_users.mark IS 'The mark that the user''s tokens must repeat: new and random at each revocation';
CREATE INDEX revoked_users_at ON tollgate.revoked_users (revoked_at, user_id);
SELECT pg_extension_config_dump('tollgate.revoked_users', '');

CREATE FUNCTION tollgate.issue_access_token(
    user_id  text,
    scopes   text[],
    audience text[]   DEFAULT NULL,
    lifetime interval DEFAULT NULL,
    claims   jsonb    DEFAULT '{}'
) RETURNS tollgate.issued_access_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'issue_access_token';
COMMENT ON FUNCTION tollgate.issue_access_token(text, text[], text[], interval, jsonb) IS
    'Issues a signed access token (RFC 9068) for a user whom the application has logged in. For the audience of tollgate.audience if none is given, for tollgate.access_token_lifetime if no lifetime is; own claims beside ours. Stores nothing; event access_token.issued only with tollgate.audit_issue; 55000 without tollgate.issuer, a signing key or its master key';

CREATE FUNCTION tollgate.record_issue(jti uuid, user_id text, detail jsonb) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail) VALUES ('access_token.issued', $1, $2, $3);
END;
COMMENT ON FUNCTION tollgate.record_issue(uuid, text, jsonb) IS 'Records that an access token was issued. Internal.';

CREATE FUNCTION tollgate.verify_access_token(token text, required_scopes text[] DEFAULT NULL, client_ip inet DEFAULT NULL, audience text DEFAULT NULL)
    RETURNS tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'verify_access_token';
COMMENT ON FUNCTION tollgate.verify_access_token(text, text[], inet, text) IS
    'Verifies a signed access token, for an audience or that of tollgate.audience: always one row, with valid and code, metadata the claims; never raises for a bad token, takes no row lock, writes nothing';

CREATE FUNCTION tollgate.presented_access_token(token text, client_ip inet) RETURNS tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'presented_access_token';
COMMENT ON FUNCTION tollgate.presented_access_token(text, inet) IS
    'Verifies a signed access token that is to be revoked, whatever its audience: not a use of it, but failed attempts count. 53400 at an address with too many failed attempts. Internal.';

CREATE FUNCTION tollgate.denial_of(token text) RETURNS text[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'denial_of';
COMMENT ON FUNCTION tollgate.denial_of(text) IS
    'Under which issuer and jti a signed token is listed when it is revoked; in place of a jti that it does not have, or that is too long, a digest of what was signed. Internal.';

CREATE FUNCTION tollgate.deny_access_token(issuer text, jti text, token_id uuid, expires_at timestamptz, user_id text, reason text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO tollgate.denied_access_tokens (issuer, jti, expires_at) VALUES ($1, $2, $4)
        ON CONFLICT ON CONSTRAINT denied_access_tokens_pkey DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('access_token.revoked', $3, $5, jsonb_strip_nulls(jsonb_build_object('reason', $6,
                'issuer', CASE WHEN $1 <> current_setting('tollgate.issuer') THEN $1 END)));
    PERFORM tollgate.notify_token_event('access_token.revoked', $3, $5, $6, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.deny_access_token(text, text, uuid, timestamptz, text, text) IS
    'Lists an access token as revoked; false when it is already. Internal.';

CREATE FUNCTION tollgate.revoke_access_token(token text, reason text DEFAULT NULL, client_ip inet DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found_token tollgate.verification;
    denial      text[];
BEGIN
    $2 := tollgate.stored_reason($2);
    -- An assignment, of which auto_explain logs no plan: it would have the token in it.
    found_token := tollgate.presented_access_token($1, $3);
    IF NOT found_token.valid THEN
        RETURN false;
    END IF;
    denial := tollgate.denial_of($1);
    RETURN tollgate.deny_access_token(denial[1], denial[2], found_token.token_id, found_token.expires_at, found_token.user_id, $2);
END
$$;
COMMENT ON FUNCTION tollgate.revoke_access_token(text, text, inet) IS
    'Revokes an access token that is presented, ours or a trusted issuer''s, so that anyone who finds a leaked one can end it; false when it is not accepted anyway. Failed attempts count and are logged as for verify_access_token; 53400 at an address with too many failed attempts; event access_token.revoked';

CREATE FUNCTION tollgate.revoke_access_token(jti uuid, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'an access token must be named'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: jti, which is NULL.',
                  HINT = 'Pass the jti that issue_access_token() returned, or the claim jti of the token.';
    END IF;
    -- The call loads the library, which defines the setting.
    PERFORM tollgate.system_identifier();
    IF current_setting('tollgate.issuer') = '' THEN
        RAISE EXCEPTION 'this database issues no access tokens'
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'The setting tollgate.issuer is empty.',
                  HINT = 'A superuser sets it with ALTER DATABASE … SET tollgate.issuer = ''https://…''.';
    END IF;
    -- Nothing that was issued is stored: it ends after the longest lifetime at the latest.
    RETURN tollgate.deny_access_token(current_setting('tollgate.issuer'), $1::text, $1, clock_timestamp() + interval '1 day', NULL,
                                      tollgate.stored_reason($2));
END
$$;
COMMENT ON FUNCTION tollgate.revoke_access_token(uuid, text) IS
    'Revokes an access token of ours by its jti, whether or not there is such a token; false when it is revoked already; event access_token.revoked';

CREATE FUNCTION tollgate.end_access_of_users(user_ids text[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- In the order in which users are locked everywhere. 48 random bits of a uuid: its first twelve digits.
    INSERT INTO tollgate.revoked_users AS r (user_id, mark, revoked_at)
        SELECT u.id, 1 + ('x' || translate(left(gen_random_uuid()::text, 13), '-', ''))::bit(48)::bigint, clock_timestamp()
        FROM (SELECT DISTINCT g.id COLLATE "C" AS id FROM unnest($1) g (id) WHERE length(g.id) BETWEEN 1 AND 255) u
        ORDER BY u.id
        ON CONFLICT ON CONSTRAINT revoked_users_pkey DO UPDATE SET mark = excluded.mark, revoked_at = excluded.revoked_at;
    -- The new mark ends their sessions too, those that are being opened included. This records it.
    RETURN tollgate.end_sessions_of_users($1, $2, $3);
END
$$;
COMMENT ON FUNCTION tollgate.end_access_of_users(text[], text, jsonb) IS
    'Gives users a new mark, so that every access token that they have is refused, ends their sessions, and returns how many. Internal.';

CREATE FUNCTION tollgate.end_access_and_notify(user_ids text[], reason text, source jsonb) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint := tollgate.end_access_of_users($1, $2, $3);
BEGIN
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('session.revoked', NULL, CASE WHEN cardinality($1) = 1 THEN $1[1] END, NULL, affected);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.end_access_and_notify(text[], text, jsonb) IS
    'end_access_of_users, with one notification if sessions ended. Internal.';

CREATE FUNCTION tollgate.revoke_user(user_id text, reason text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
    sessions bigint;
BEGIN
    PERFORM tollgate.check_user_named($1), tollgate.without_token('user_id', $1);
    IF length($1) > 255 THEN
        RAISE EXCEPTION 'a user id has at most 255 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: user_id, of %s characters.', length($1)),
                  HINT = 'Pass the key of the user as it was passed to issue tokens.';
    END IF;
    $2 := tollgate.stored_reason($2);
    affected := tollgate.revoke_without_notification(ARRAY[$1], $2, '{}');
    sessions := tollgate.end_access_of_users(ARRAY[$1], $2, '{}');
    INSERT INTO tollgate.audit_log (event, user_id, detail)
        VALUES ('user.revoked', $1, jsonb_strip_nulls(jsonb_build_object('reason', $2, 'tokens', affected, 'sessions', sessions)));
    PERFORM tollgate.notify_token_event('user.revoked', NULL, $1, NULL, affected);
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_user(text, text) IS
    'Ends all access that a user has now: revokes every API token, of which it returns how many, ends every session, and refuses every access token that was issued before; the user may log in again at once. Events user.revoked, token.revoked for each API token and session.revoked for each session, one notification; 22023 without a user';

-- Both are kept for a day longer than a token can be accepted that they concern, so that a clock that is set back by a day
-- revives nothing: our own live for a day at most, those of trusted issuers for 7 days.

CREATE FUNCTION tollgate.purge_denied_after(batch_size integer, INOUT expires_at timestamptz, INOUT jti text, OUT looked_at bigint, OUT purged bigint)
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
    WITH deleted AS (
        DELETE FROM tollgate.denied_access_tokens d
            WHERE d.ctid = ANY (ARRAY(
                SELECT o.ctid FROM tollgate.denied_access_tokens o
                WHERE o.expires_at < now() - interval '1 day'
                  AND (o.expires_at, o.jti) > (purge_denied_after.expires_at, purge_denied_after.jti COLLATE "C")
                ORDER BY o.expires_at, o.jti LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING d.expires_at, d.jti
    ), furthest AS (
        SELECT d.expires_at, d.jti FROM deleted d ORDER BY d.expires_at DESC, d.jti DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, purge_denied_after.expires_at), coalesce(f.jti, purge_denied_after.jti), a.number, a.number
        INTO purge_denied_after.expires_at, purge_denied_after.jti, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_denied_after(integer, timestamptz, text) IS
    'A batch of purge_denials after a place (NULL: from the front): of tokens that were revoked one by one. Internal.';

CREATE FUNCTION tollgate.purge_revoked_users_after(batch_size integer, INOUT revoked_at timestamptz, INOUT user_id text, OUT looked_at bigint, OUT purged bigint)
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
DECLARE
    due text[];
BEGIN
    revoked_at := coalesce(revoked_at, '-infinity');
    user_id := coalesce(user_id, '');
    due := ARRAY(
        SELECT o.user_id FROM tollgate.revoked_users o
        WHERE o.revoked_at < now() - interval '8 days'
          AND (o.revoked_at, o.user_id) > (purge_revoked_users_after.revoked_at, purge_revoked_users_after.user_id COLLATE "C")
        ORDER BY o.revoked_at, o.user_id LIMIT $1 FOR UPDATE SKIP LOCKED);
    -- Sessions live longer than the mark. Those that it has ended were being opened when it was given.
    PERFORM tollgate.end_sessions(ARRAY(
        SELECT s.id FROM unnest(due) d (id) JOIN tollgate.revoked_users r ON r.user_id = d.id COLLATE "C" JOIN tollgate.sessions s ON s.user_id = r.user_id
        WHERE s.revoked_at IS NULL AND s.user_mark IS DISTINCT FROM r.mark
        ORDER BY s.user_id, s.id FOR UPDATE OF s), 'the user was revoked', '{}');
    WITH deleted AS (
        DELETE FROM tollgate.revoked_users u
            WHERE u.user_id = ANY (due COLLATE "C")
            RETURNING u.revoked_at, u.user_id
    ), furthest AS (
        SELECT d.revoked_at, d.user_id FROM deleted d ORDER BY d.revoked_at DESC, d.user_id DESC LIMIT 1
    )
    SELECT coalesce(f.revoked_at, purge_revoked_users_after.revoked_at), coalesce(f.user_id, purge_revoked_users_after.user_id), a.number, a.number
        INTO purge_revoked_users_after.revoked_at, purge_revoked_users_after.user_id, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_revoked_users_after(integer, timestamptz, text) IS
    'A batch of purge_denials after a place (NULL: from the front): of users whose access tokens were revoked. Internal.';

CREATE FUNCTION tollgate.purge_denials(batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    affected := tollgate.continue_walk('purge_denied', 'tollgate.purge_denied_after($2, $3, $4)', NULL, $1);
    IF affected < $1 THEN
        affected := affected + tollgate.continue_walk(
            'purge_revoked_users', 'tollgate.purge_revoked_users_after($2, $3, $4)', NULL, ($1 - affected)::integer);
    END IF;
    IF affected < $1 THEN
        affected := affected + tollgate.continue_walk(
            'purge_assertions', 'tollgate.purge_assertions_after($2, $3, $4)', NULL, ($1 - affected)::integer);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_denials(integer) IS
    'Deletes what is stored of revoked access tokens, and of users whose access tokens were revoked, and of assertions that were used, once no token can still be affected, and returns how many';

CREATE FUNCTION tollgate.usage_id_of_user(user_id text) RETURNS uuid
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'usage_id_of_user';
COMMENT ON FUNCTION tollgate.usage_id_of_user(text) IS
    'The id under which the access tokens of a user are counted: a digest of the user id as a uuid of version 8, which no token has. Internal.';

CREATE FUNCTION tollgate.access_token_usage(user_id text, OUT use_count bigint, OUT denied_count bigint, OUT last_used_at timestamptz, OUT last_used_ip inet)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(u.use_count, 0), coalesce(u.denied_count, 0), u.last_used_at, u.last_used_ip
        FROM tollgate.usage_id_of_user(tollgate.without_token('user_id', $1)) i (id) LEFT JOIN tollgate.token_usage u ON u.token_id = i.id;
END;
COMMENT ON FUNCTION tollgate.access_token_usage(text) IS
    'How often the access tokens of a user were accepted and refused, and when and from where one was accepted last, as of the last flush: they are counted together, on the user';

CREATE FUNCTION tollgate.current_claims() RETURNS jsonb
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_claims';
COMMENT ON FUNCTION tollgate.current_claims() IS
    'Claims of the authenticated access token, those that tollgate.identity_claims names; NULL without one';

CREATE FUNCTION tollgate.current_actor() RETURNS jsonb
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_actor';
COMMENT ON FUNCTION tollgate.current_actor() IS
    'Who acts for the user, by the authenticated access token: its claim act (RFC 8693 section 4.1); NULL if the user does';

CREATE FUNCTION tollgate.current_issuer() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_issuer';
COMMENT ON FUNCTION tollgate.current_issuer() IS 'Issuer of the authenticated access token; NULL without one';
