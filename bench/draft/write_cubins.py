import sys; sys.path.insert(0,'bench/draft')
import nvb, os, json, shutil
D='.scratch/cubins/'; shutil.rmtree(D,ignore_errors=True); os.makedirs(D)
idx=[]
L=[((128,64,128,8,1,2,4,2,2,2),0),((64,64,64,4,2,2,2,2,2,2),0),((64,128,128,8,1,4,4,4,2,2),0),((256,64,64,8,1,2,2,2,2,2),0),((256,64,64,8,1,4,2,2,2,2),0)]
for c,g in L:
    cfg=nvb.C(*c,general=g)
    for arch in ('sm_90',)+():
        b,log,t=nvb.compile(cfg,arch=arch); assert b,log
        n='_'.join(map(str,c))+('G' if g else '')+('.ptx' if arch[0]=='c' else '.cubin'); open(D+n,'wb').write(b); idx.append((n,cfg))
json.dump(idx,open(D+'index.json','w'))
