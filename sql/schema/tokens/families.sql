-- Families: a token and all that were derived from it, at any depth. Verification reads one row only, so a change that
-- narrows, disables or ends a token does the same to its descendants in the same transaction.
--
-- Locks. A transaction that changes a token, or derives from it, locks the row of its family's root first and only then
-- other rows of the family; of several families, the roots in the order of their users and ids. Before those comes the
-- lock of max_tokens_per_user, and after them that on the scope catalogue. expire_tokens and purge_tokens wait for no
-- row, so the order does not apply to them.

CREATE FUNCTION tollgate.derive_api_token(parent text, name text, scopes text[], expires_in interval, allowed_ips cidr[] DEFAULT NULL,
                                         client_ip inet DEFAULT NULL, expires_at timestamptz DEFAULT NULL)
    RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'derive_api_token';
COMMENT ON FUNCTION tollgate.derive_api_token(text, text, text[], interval, cidr[], inet, timestamptz) IS
    'Derives a token from a presented one (28000 unless that is valid): never wider in scope, time or networks (22023), where NULL inherits the parent''s; inherits its metadata; ends, is disabled and is narrowed with it; at most 8 generations; event token.derived. Failed attempts count and are logged as for verify_api_token';

CREATE FUNCTION tollgate.presented_token_id(token text, client_ip inet) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'presented_token_id';
COMMENT ON FUNCTION tollgate.presented_token_id(text, inet) IS
    'The id of a presented token, also of one that this transaction''s snapshot does not show; NULL if it is malformed or unknown; raises 53400 at an address with too many failed attempts. Internal.';

CREATE FUNCTION tollgate.check_snapshot(token_id uuid, user_ids text[]) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_snapshot';
COMMENT ON FUNCTION tollgate.check_snapshot(uuid, text[]) IS
    'Raises 40001 under REPEATABLE READ when a token, or the tokens of some users, have changed since the transaction''s snapshot. Internal.';

CREATE FUNCTION tollgate.lock_token_slots(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'lock_token_slots';
COMMENT ON FUNCTION tollgate.lock_token_slots(text) IS
    'Waits for other transactions that add a live token for a user, where tollgate.max_tokens_per_user sets a limit. Internal.';

CREATE FUNCTION tollgate.claim_token_slot(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'claim_token_slot';
COMMENT ON FUNCTION tollgate.claim_token_slot(text) IS
    'Raises 53400 unless tollgate.max_tokens_per_user allows a user one more live token. Internal.';

CREATE FUNCTION tollgate.network_contains(outer_network cidr, inner_network cidr) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'network_contains';
COMMENT ON FUNCTION tollgate.network_contains(cidr, cidr) IS
    'Whether a network lies within another, by the rules of verification: an IPv4 address written as IPv6 is the IPv4 address. Internal.';

CREATE FUNCTION tollgate.ancestors(token_id uuid) RETURNS SETOF uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE line AS (
        SELECT t.parent_id AS id, 1 AS distance FROM tollgate.api_tokens t WHERE t.id = $1
        UNION ALL
        SELECT t.parent_id, l.distance + 1 FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
    )
    SELECT l.id FROM line l WHERE l.id IS NOT NULL ORDER BY l.distance;
END;
COMMENT ON FUNCTION tollgate.ancestors(uuid) IS 'The tokens that a token was derived from, the parent first, the root last. Internal.';

CREATE FUNCTION tollgate.descendants(token_id uuid) RETURNS SETOF uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE family AS (
        SELECT t.id FROM tollgate.api_tokens t WHERE t.parent_id = $1
        UNION ALL
        SELECT t.id FROM family f JOIN tollgate.api_tokens t ON t.parent_id = f.id
    )
    SELECT f.id FROM family f;
END;
COMMENT ON FUNCTION tollgate.descendants(uuid) IS 'The tokens that were derived from a token, at any depth. Internal.';

CREATE FUNCTION tollgate.lock_token(token_id uuid, lock_slots boolean DEFAULT false) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    root  uuid;
    token tollgate.api_tokens;
BEGIN
    IF $2 THEN
        PERFORM tollgate.lock_token_slots(t.user_id) FROM tollgate.api_tokens t WHERE t.id = $1;
    END IF;
    -- A parent never changes, so it may be read before anything is locked.
    SELECT coalesce((SELECT a.id FROM tollgate.ancestors($1) WITH ORDINALITY a (id, n) ORDER BY a.n DESC LIMIT 1), $1) INTO root;
    PERFORM FROM tollgate.api_tokens t WHERE t.id = root FOR UPDATE;
    SELECT t.* INTO token FROM tollgate.api_tokens t WHERE t.id = $1 FOR UPDATE;
    PERFORM tollgate.check_snapshot($1, ARRAY[token.user_id]);
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_token(uuid, boolean) IS
    'Locks the family of a token until the transaction ends, and returns its row as it is then; NULLs if there is none. Internal.';

CREATE FUNCTION tollgate.intersect_scopes(a text[], b text[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT ARRAY(SELECT s FROM unnest($1) s WHERE tollgate.scope_grants($2, s)
                 UNION
                 SELECT s FROM unnest($2) s WHERE tollgate.scope_grants($1, s)
                 ORDER BY 1);
END;
COMMENT ON FUNCTION tollgate.intersect_scopes(text[], text[]) IS 'The scopes that grant exactly what both lists grant. Internal.';

CREATE FUNCTION tollgate.networks_contain(outer_networks cidr[], inner_networks cidr[]) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT $1 IS NULL OR ($2 IS NOT NULL AND NOT EXISTS (
        SELECT FROM unnest($2) i
        WHERE NOT EXISTS (SELECT FROM unnest($1) o WHERE tollgate.network_contains(o, i))));
END;
COMMENT ON FUNCTION tollgate.networks_contain(cidr[], cidr[]) IS
    'Whether each of the inner networks lies within one of the outer; NULL is anywhere. Internal.';

CREATE FUNCTION tollgate.intersect_networks(a cidr[], b cidr[]) RETURNS cidr[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN $1 IS NULL THEN $2 WHEN $2 IS NULL THEN $1 ELSE
        ARRAY(SELECT n FROM unnest($1) n WHERE EXISTS (SELECT FROM unnest($2) o WHERE tollgate.network_contains(o, n))
              UNION
              SELECT n FROM unnest($2) n WHERE EXISTS (SELECT FROM unnest($1) o WHERE tollgate.network_contains(o, n))
              ORDER BY 1) END;
END;
COMMENT ON FUNCTION tollgate.intersect_networks(cidr[], cidr[]) IS
    'The networks that are in both lists, possibly none, which allows no address; NULL is anywhere. Internal.';

CREATE FUNCTION tollgate.limit_within(outer_limit integer, outer_window interval, inner_limit integer, inner_window interval) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT $1 IS NULL OR ($3 IS NOT NULL AND $3 <= $1 AND $3 / extract(epoch FROM $4) <= $1 / extract(epoch FROM $2));
END;
COMMENT ON FUNCTION tollgate.limit_within(integer, interval, integer, interval) IS
    'Whether a rate limit allows neither a larger burst nor a higher rate than another; NULL is no limit. Internal.';

CREATE FUNCTION tollgate.token_is_within(token tollgate.api_tokens, bound tollgate.api_tokens) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT NOT EXISTS (SELECT FROM unnest($1.scopes) s WHERE NOT tollgate.scope_grants($2.scopes, s))
       AND coalesce($1.expires_at, 'infinity') <= coalesce($2.expires_at, 'infinity')
       AND tollgate.networks_contain($2.allowed_ips, $1.allowed_ips)
       AND tollgate.limit_within($2.rate_limit, $2.rate_window, $1.rate_limit, $1.rate_window)
$$;
COMMENT ON FUNCTION tollgate.token_is_within(tollgate.api_tokens, tollgate.api_tokens) IS
    'Whether a token grants no more than another in scope, time, networks and limits. Internal.';

CREATE FUNCTION tollgate.token_changes(before tollgate.api_tokens, after tollgate.api_tokens) RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(jsonb_object_agg(b.key, jsonb_build_object('from', b.value, 'to', a.value)), '{}')
    FROM jsonb_each(to_jsonb($1)) b JOIN jsonb_each(to_jsonb($2)) a ON a.key = b.key
    WHERE a.value <> b.value
      AND b.key = ANY ('{name,scopes,expires_at,metadata,allowed_ips,rate_limit,rate_window}')
$$;
COMMENT ON FUNCTION tollgate.token_changes(tollgate.api_tokens, tollgate.api_tokens) IS
    'The detail of an event about a changed token: {"key": {"from": …, "to": …}}. Internal.';

CREATE FUNCTION tollgate.narrow_descendants(token tollgate.api_tokens, reason text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    -- Each had no more than its parent. The intersection of a descendant with the ancestor is then within the
    -- intersection of its parent with the ancestor, so all can be narrowed at once.
    WITH narrowed AS (
        UPDATE tollgate.api_tokens d
            SET scopes = tollgate.intersect_scopes(d.scopes, $1.scopes),
                expires_at = least(d.expires_at, $1.expires_at),
                allowed_ips = tollgate.intersect_networks(d.allowed_ips, $1.allowed_ips),
                (rate_limit, rate_window) = (
                    SELECT l.rate_limit, l.rate_window
                    FROM (VALUES (d.rate_limit, d.rate_window, 1), ($1.rate_limit, $1.rate_window, 2)) l (rate_limit, rate_window, n)
                    WHERE tollgate.limit_within($1.rate_limit, $1.rate_window, l.rate_limit, l.rate_window)
                    ORDER BY l.n LIMIT 1)
            FROM tollgate.api_tokens before
            WHERE d.id = ANY (ARRAY(SELECT tollgate.descendants($1.id))) AND before.id = d.id AND d.revoked_at IS NULL
              AND NOT tollgate.token_is_within(d, $1)
            RETURNING d.id, d.user_id, tollgate.token_changes(before, d) AS changes
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.updated', n.id, n.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $2, 'ancestor', $1.id)) || jsonb_build_object('changes', n.changes)
            FROM narrowed n ORDER BY n.id
    )
    SELECT count(*) INTO affected FROM narrowed;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.narrow_descendants(tollgate.api_tokens, text) IS
    'Narrows the descendants of a token to what it has, with an event token.updated each, and returns how many. Internal.';

CREATE FUNCTION tollgate.notify_family_event(event text, token_id uuid, user_id text, reason text, descendants bigint) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.notify_token_event($1, $2, $3, $4, CASE WHEN $5 > 0 THEN $5 + 1 END);
END;
COMMENT ON FUNCTION tollgate.notify_family_event(text, uuid, text, text, bigint) IS
    'Notifies that access of a token was taken away, or of several at once if it has descendants. Internal.';
