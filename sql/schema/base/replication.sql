-- What logical replication changes for our tables: it carries rows, and neither sequences nor the state of a cluster.
--
-- Where a database subscribes to our tables, as for a switch-over to another server, three rules hold. Events are given a
-- place in the subscriber's own history as they arrive (audit.sql). What is of one cluster alone is not taken over: the
-- triggers that keep it out are enabled for the replica role only, which ordinary writes pay nothing for, and look whether
-- it is an apply worker that writes, since the restoration of a dump may run in that role too. And an id that is taken
-- from a sequence is never behind those that are there.

CREATE FUNCTION tollgate.is_logical_worker() RETURNS boolean
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'is_logical_worker';
COMMENT ON FUNCTION tollgate.is_logical_worker() IS
    'Whether this process applies what a subscription receives, the first copy of its tables included. Internal.';

CREATE FUNCTION tollgate.leave_out() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.leave_out() IS 'Trigger that keeps out a row, or a change of one, that a subscription receives. Internal.';

CREATE FUNCTION tollgate.sequences_behind() RETURNS TABLE (sequence regclass, last_value bigint, owner regclass, owned_column name, greatest_id bigint)
    LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 1
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    FOR sequence, owner, owned_column IN
        SELECT c.oid, a.attrelid, a.attname
        FROM pg_class c
        JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid
                        AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE c.relkind = 'S' AND c.relnamespace = 'tollgate'::regnamespace
    LOOP
        EXECUTE format('SELECT s.last_value, m.id FROM %s s, (SELECT max(%I) AS id FROM %s) m
                        WHERE m.id > s.last_value OR m.id = s.last_value AND NOT s.is_called', sequence, owned_column, owner)
            INTO last_value, greatest_id;
        IF last_value IS NOT NULL THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.sequences_behind() IS
    'Sequences of ours whose next number is not above those in the column that it is for. Internal.';

CREATE FUNCTION tollgate.advance_sequence(sequence regclass, last bigint) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM setval($1, $2);
    RAISE LOG 'the sequence % was behind its table, and now stands at %', $1, $2;
END
$$;
COMMENT ON FUNCTION tollgate.advance_sequence(regclass, bigint) IS 'Sets a sequence that was found to be behind its table, and logs it. Internal.';

-- Sequences fall behind where rows come by logical replication or by hand. A revocation must not fail for that.
CREATE FUNCTION tollgate.next_id(sequence regclass) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'next_id';
COMMENT ON FUNCTION tollgate.next_id(regclass) IS
    'The next number of a sequence; a session that asks for the first time, after an abort, or is given a number that is not above its last one has the sequence advanced first if it is behind its table. Internal.';
