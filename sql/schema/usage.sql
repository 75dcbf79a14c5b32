-- Usage: counted in shared memory, carried to these tables by whoever drains, applies and acknowledges.

CREATE TABLE tollgate.token_usage (
    token_id     uuid   PRIMARY KEY,
    use_count    bigint NOT NULL CHECK (use_count >= 0),
    denied_count bigint NOT NULL CHECK (denied_count >= 0),
    last_used_at timestamptz,
    last_used_ip inet
) WITH (fillfactor = 70);
COMMENT ON TABLE tollgate.token_usage IS
    'Uses and denials per token as of the last flush. No foreign key: its check would lock, and so write, the row of the token';
SELECT pg_extension_config_dump('tollgate.token_usage', '');

CREATE TABLE tollgate.usage_flushes (
    node       text        NOT NULL,
    boot       uuid        NOT NULL,
    generation bigint      NOT NULL,
    flushes    bigint      NOT NULL DEFAULT 1,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (node, boot)
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.usage_flushes IS
    'The last generation of counters applied, per server start: what makes a repeated apply_usage do nothing';

CREATE TYPE tollgate.usage_row AS (
    token_id     uuid,
    uses         bigint,
    denials      bigint,
    last_used_at timestamptz,
    last_used_ip inet
);
COMMENT ON TYPE tollgate.usage_row IS 'What one token was used in one generation of counters';

CREATE FUNCTION tollgate.drain_usage() RETURNS TABLE (
        node text, boot uuid, generation bigint,
        token_id uuid, uses bigint, denials bigint, last_used_at timestamptz, last_used_ip inet)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'drain_usage_wrapper';
COMMENT ON FUNCTION tollgate.drain_usage() IS
    'Closes this database''s counters and hands them out: the same uses and denials again until ack_usage; no rows when there is nothing. Writes nothing, so it works on a standby';

CREATE FUNCTION tollgate.apply_usage(node text, boot uuid, generation bigint, rows tollgate.usage_row[]) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $4 IS NULL THEN
        RAISE EXCEPTION 'apply_usage takes no NULL'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: node, boot, generation, rows.',
                  HINT = 'Pass on what drain_usage() returned.';
    END IF;
    INSERT INTO tollgate.usage_flushes AS f (node, boot, generation) VALUES ($1, $2, $3)
        ON CONFLICT ON CONSTRAINT usage_flushes_pkey
        DO UPDATE SET generation = excluded.generation, flushes = f.flushes + 1, applied_at = now()
        WHERE f.generation < excluded.generation;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- Sorted, so that two flushes that touch the same tokens cannot deadlock.
    INSERT INTO tollgate.token_usage AS u (token_id, use_count, denied_count, last_used_at, last_used_ip)
        SELECT r.token_id, r.uses, r.denials, r.last_used_at, r.last_used_ip
        FROM unnest($4) r
        WHERE EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.id = r.token_id)
        ORDER BY r.token_id
        ON CONFLICT ON CONSTRAINT token_usage_pkey DO UPDATE SET
            use_count = u.use_count + excluded.use_count,
            denied_count = u.denied_count + excluded.denied_count,
            last_used_at = greatest(u.last_used_at, excluded.last_used_at),
            last_used_ip = CASE WHEN excluded.last_used_at >= coalesce(u.last_used_at, '-infinity')
                                THEN excluded.last_used_ip ELSE u.last_used_ip END;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.apply_usage(text, uuid, bigint, tollgate.usage_row[]) IS
    'Adds drained counters to token_usage, once: true when done now, false when this generation had been applied before';

CREATE FUNCTION tollgate.ack_usage(generation bigint) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'ack_usage';
COMMENT ON FUNCTION tollgate.ack_usage(bigint) IS
    'Frees a drained generation. Only after the transaction of apply_usage has committed; false when it is not the one handed out';

CREATE FUNCTION tollgate.usage_pressure() RETURNS TABLE (pressure double precision, overflowed bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'usage_pressure_wrapper';
COMMENT ON FUNCTION tollgate.usage_pressure() IS
    'How much of the server''s room for counters is taken by what is not flushed, from 0 to 1, and how many uses found no room since it started: cheap, to be asked many times a second';
