-- Support for logical replication: it replicates rows, but neither sequences nor the state of a cluster.
--
-- Where a database subscribes to our tables, for example for a switch-over to another server, three rules apply. Events
-- get a place in the subscriber's own history as they arrive (audit.sql). Rows that belong to one cluster are kept out:
-- the triggers that do so are enabled for the replica role only, so ordinary writes pay nothing for them, and check for
-- an apply worker, since a dump may be restored in that role too. And an id from a sequence is never below those in the
-- table.

CREATE FUNCTION tollgate.is_logical_worker() RETURNS boolean
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'is_logical_worker';
COMMENT ON FUNCTION tollgate.is_logical_worker() IS
    'Whether this process applies the changes of a subscription, including the initial copy of its tables. Internal.';

CREATE FUNCTION tollgate.leave_out() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.leave_out() IS 'Trigger that discards a row, or a change of one, that a subscription receives. Internal.';

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
    'Our sequences whose next number is not above those in their column. Internal.';

CREATE FUNCTION tollgate.advance_sequence(sequence regclass, last bigint) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM setval($1, $2);
    RAISE LOG 'the sequence % was behind its table, and is now at %', $1, $2;
END
$$;
COMMENT ON FUNCTION tollgate.advance_sequence(regclass, bigint) IS 'Advances a sequence that is behind its table, and logs it. Internal.';

-- Sequences fall behind when rows arrive by logical replication or by hand. A revocation must not fail because of that.
CREATE FUNCTION tollgate.next_id(sequence regclass) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'next_id';
COMMENT ON FUNCTION tollgate.next_id(regclass) IS
    'The next number of a sequence. A session first checks whether the sequence is behind its table, and advances it, on its first call, after an abort, and when the number is not above its last one. Internal.';
